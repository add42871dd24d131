"""Time a bundle against its own dense form and against transformers, in one run.

All subjects are loaded first and measured in turns, round after round, so that a slow moment of
the machine hits all of them; what is reported are medians and their ratios. Peak memory is
taken in a process of its own for each subject.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dllava_export.backends.registry import DEFAULT_BACKEND
from dllava_export.benchmark.bench_report import BenchReport, Measurement
from dllava_export.benchmark.bench_settings import BenchSettings
from dllava_export.benchmark.bundle_subjects import SessionSubject, TorchSubject
from dllava_export.benchmark.machine import machine_line, wait_for_idle_threads
from dllava_export.benchmark.subject import BundleSubject
from dllava_export.bundles.manifest import Manifest, read_manifest
from dllava_export.errors import BackendError
from dllava_export.precision import Precision
from dllava_export.sparsity import DENSE

__all__ = ["measure_subjects", "run_bench", "subject_makers"]


def run_bench(
    folder: str | Path, settings: BenchSettings | None = None, *, progress: bool = False
) -> BenchReport:
    """Measure a bundle.

    Args:
        folder: A bundle with an image; of any policy.
        settings: What to measure.
        progress: Show a progress bar on stderr.

    Raises:
        DllavaExportError: If the bundle cannot be loaded.
    """
    settings = settings or BenchSettings()
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest.has_visual:
        raise BackendError(
            f"{folder} has no vision tower; bench expects a bundle exported from a checkpoint, "
            "whose prompts hold an image. Export one, with --random-weights if need be."
        )
    makers, left_out = subject_makers(folder, manifest, settings)
    report = measure_subjects(makers, settings, progress=progress)
    for result in report.subjects:
        result.peak_rss_bytes = _peak_memory(folder, settings, result.name)
    report.left_out.extend(left_out)
    return report


def measure_subjects(
    makers: Mapping[str, Callable[[], BundleSubject]],
    settings: BenchSettings,
    *,
    progress: bool = False,
) -> BenchReport:
    """Time subjects in turns.

    Args:
        makers: Name → opens a subject.
        settings: What to measure.
        progress: Show a progress bar on stderr.

    Returns:
        Everything but peak memory, which wants a process for each subject.
    """
    from tqdm import tqdm

    results = {name: Measurement(name) for name in makers}
    subjects = {}
    with tqdm(
        total=len(makers) * (settings.rounds + 1), disable=not progress, leave=False
    ) as bar:
        for name, make in makers.items():
            bar.set_description(f"loading {name}")
            subjects[name] = make()
            bar.update()
        times = {name: _Times(settings) for name in makers}
        for _ in range(settings.rounds):
            for name, subject in subjects.items():
                bar.set_description(f"timing {name}")
                wait_for_idle_threads()
                times[name].take_turn(subject)
                bar.update()
    for name, subject in subjects.items():
        times[name].summarise(results[name])
        for length in settings.decode_lengths:
            results[name].kv_bytes[length] = subject.kv_bytes(length)
        results[name].kv_allocated_bytes = subject.kv_allocated_bytes()
    first = next(iter(subjects.values()))
    ratio = _capacity_ratio(first, settings) if isinstance(first, SessionSubject) else None
    return BenchReport(settings, list(results.values()), ratio, machine_line(), [])


def subject_makers(
    folder: Path, manifest: Manifest, settings: BenchSettings
) -> tuple[dict[str, Callable[[], BundleSubject]], list[str]]:
    """Return what can be measured, by name, and why the rest cannot."""
    left_out = []
    makers: dict[str, Callable[[], BundleSubject]] = {}
    own = manifest.sparsity
    if own.is_dense:
        left_out.append(
            "sparse: the bundle is dense; `dllava-export sparsify` makes a sparse one"
        )
    else:
        makers["sparse"] = lambda: SessionSubject(folder, settings, own)
    if own.is_dense or settings.backend == DEFAULT_BACKEND:
        makers["dense"] = lambda: SessionSubject(folder, settings, DENSE)
    else:
        left_out.append(
            f"dense: the engines of {settings.backend} are the sparse decoder's; export with "
            "--policy none and build that to time it"
        )
    if settings.backend != DEFAULT_BACKEND:
        left_out.append("transformers: compared with ONNX Runtime only")
    elif manifest.precision != Precision.of("fp32"):
        left_out.append(
            f"transformers: compared at fp32 only, the bundle is {manifest.precision}"
        )
    else:
        makers["transformers"] = lambda: TorchSubject(folder, settings)
    return makers, left_out


class _Times:
    def __init__(self, settings: BenchSettings) -> None:
        self._settings = settings
        self._prefill: list[float] = []
        self._decode: dict[int, list[float]] = {n: [] for n in settings.decode_lengths}

    def take_turn(self, subject: BundleSubject) -> None:
        for length in self._settings.decode_lengths:
            # Every turn starts with a prefill: one untimed call warms the caches up.
            start = time.perf_counter()
            subject.prefill()
            self._prefill.append(time.perf_counter() - start)
            subject.fill(length)
            subject.decode()
            start = time.perf_counter()
            for _ in range(self._settings.decode_steps):
                subject.decode()
            elapsed = time.perf_counter() - start
            self._decode[length].append(elapsed / self._settings.decode_steps)

    def summarise(self, result: Measurement) -> None:
        result.prefill_ms = 1e3 * statistics.median(self._prefill)
        result.decode_ms = {n: 1e3 * statistics.median(t) for n, t in self._decode.items()}


def _capacity_ratio(subject: SessionSubject, settings: BenchSettings) -> float | None:
    """Time decode steps at equal lengths with the planned and with four times the capacity."""
    if settings.backend != DEFAULT_BACKEND:
        return None
    length = max(settings.decode_lengths)
    planned = subject.num_new
    times: dict[int, list[float]] = {planned: [], 4 * planned: []}
    for _ in range(settings.rounds):
        for num_new, found in times.items():
            subject.num_new = num_new
            subject.prefill()
            subject.fill(length)
            subject.decode()
            start = time.perf_counter()
            for _ in range(settings.decode_steps):
                subject.decode()
            found.append(time.perf_counter() - start)
    subject.num_new = planned
    return statistics.median(times[4 * planned]) / statistics.median(times[planned])


def _peak_memory(folder: Path, settings: BenchSettings, name: str) -> int:
    """Run one prefill and some decode steps in a fresh process; return its peak RSS in bytes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_memory, folder, settings, name).result()


def _measure_memory(folder: Path, settings: BenchSettings, name: str) -> int:
    import resource

    if name == "transformers":
        subject: BundleSubject = TorchSubject(folder, settings)
    else:
        manifest = read_manifest(folder, verify=False)
        sparsity = manifest.sparsity if name == "sparse" else DENSE
        subject = SessionSubject(folder, settings, sparsity)
    subject.prefill()
    for _ in range(settings.decode_steps):
        subject.decode()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
