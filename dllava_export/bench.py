"""Time a bundle against its own dense form and against transformers, in one run.

All subjects are loaded first and measured in turns, round after round, so that a slow moment of
the machine hits all of them; what is reported are medians and their ratios. Peak memory is
taken in a process of its own for each subject.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllava_export import bundle
from dllava_export.benchmark.bundle_session import DENSE_SPARSITY
from dllava_export.benchmark.bundle_subjects import BundleSubject, SessionSubject, TorchSubject
from dllava_export.benchmark.machine import machine_line, wait_for_idle_threads
from dllava_export.errors import BackendError

__all__ = ["BenchReport", "BenchSettings", "Measurement", "run_bench"]


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        prompt_text_len: Text tokens of the prompt, beside the image.
        decode_lengths: Generated tokens already in the cache when decode steps are timed.
        batch_size: Samples, all alike.
        num_threads: Threads of every runtime.
        rounds: Turns; medians over them are reported.
        decode_steps: Decode steps per turn and length.
        backend: What runs the bundle itself: `onnxruntime`, `tensorrt` or `tensorrt-rtx`. Its
            dense form and transformers are compared with ONNX Runtime only.
    """

    prompt_text_len: int = 64
    decode_lengths: tuple[int, ...] = (0, 256)
    batch_size: int = 1
    num_threads: int = 2
    rounds: int = 5
    decode_steps: int = 8
    backend: str = "onnxruntime"


@dataclasses.dataclass
class Measurement:
    """One subject's results.

    Attributes:
        name: `sparse`, `dense` or `transformers`.
        prefill_ms: Median time of the decoder's prefill; the vision tower is not part of it.
        decode_ms: Generated length → median time of one decode step.
        kv_bytes: Generated length → bytes of valid cache rows.
        kv_allocated_bytes: Bytes of cache buffers at the largest length.
        peak_rss_bytes: Peak resident memory of a process that loads it, prefills and decodes.
    """

    name: str
    prefill_ms: float = 0.0
    decode_ms: dict[int, float] = dataclasses.field(default_factory=dict)
    kv_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    kv_allocated_bytes: int = 0
    peak_rss_bytes: int = 0


@dataclasses.dataclass
class BenchReport:
    """All measurements of one run.

    Attributes:
        settings: What was measured.
        subjects: `sparse` first.
        capacity_ratio: Decode time with four times the cache capacity over that with the
            planned one, at the same lengths: 1 where time does not depend on capacity. None for
            engines, whose capacity is fixed.
        machine: Processor, cores and date.
        left_out: What could not be measured, and why.
    """

    settings: BenchSettings
    subjects: list[Measurement]
    capacity_ratio: float | None
    machine: str
    left_out: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return a table with ratios over `sparse`."""
        lengths = self.settings.decode_lengths
        header = [
            "",
            "prefill",
            *(f"decode@{n}" for n in lengths),
            "KV used",
            "KV alloc",
            "peak RSS",
        ]
        rows = [header]
        base = self.subjects[0]
        for subject in self.subjects:
            cells = [subject.name, _cell(subject.prefill_ms, base.prefill_ms)]
            cells += [_cell(subject.decode_ms[n], base.decode_ms[n]) for n in lengths]
            cells += [
                _mib(subject.kv_bytes[lengths[-1]]),
                _mib(subject.kv_allocated_bytes),
                _mib(subject.peak_rss_bytes),
            ]
            rows.append(cells)
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        settings = self.settings
        return "\n".join(
            [
                f"{self.machine}; {settings.num_threads} threads, batch {settings.batch_size}, "
                f"prompt of {settings.prompt_text_len} text tokens and one image",
                "times in ms, medians of "
                f"{settings.rounds} interleaved rounds; in brackets: times as long as sparse",
                *table,
                *self._capacity_lines(),
                *(f"left out: {reason}" for reason in self.left_out),
            ]
        )

    def _capacity_lines(self) -> list[str]:
        if self.capacity_ratio is None:
            return []
        return [
            f"decode with 4 x the cache capacity, same length: {self.capacity_ratio:.2f} x "
            "the time"
        ]


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
    from tqdm import tqdm

    settings = settings or BenchSettings()
    folder = Path(folder)
    manifest = bundle.read_manifest(folder)
    if not manifest.has_visual:
        raise BackendError(
            f"{folder} has no vision tower; bench expects a bundle exported from a checkpoint, "
            "whose prompts hold an image. Export one, with --random-weights if need be."
        )
    makers, left_out = _subject_makers(folder, manifest, settings)
    total = len(makers) * (settings.rounds + 2)
    with tqdm(total=total, disable=not progress, desc="loading", leave=False) as bar:
        results = {}
        for name in makers:
            bar.set_description(f"peak memory of {name}")
            results[name] = Measurement(
                name, peak_rss_bytes=_peak_memory(folder, settings, name)
            )
            bar.update()
        subjects = {}
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
    first = next(s for s in subjects.values() if isinstance(s, SessionSubject))
    return BenchReport(
        settings,
        list(results.values()),
        _capacity_ratio(first, settings),
        machine_line(),
        left_out,
    )


def _subject_makers(
    folder: Path, manifest: bundle.Manifest, settings: BenchSettings
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
    if own.is_dense or settings.backend == "onnxruntime":
        makers["dense"] = lambda: SessionSubject(folder, settings, DENSE_SPARSITY)
    else:
        left_out.append(
            f"dense: the engines of {settings.backend} are the sparse decoder's; export with "
            "--policy none and build that to time it"
        )
    if settings.backend != "onnxruntime":
        left_out.append("transformers: compared with ONNX Runtime only")
    elif manifest.precision != "fp32":
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
            subject.pretend_generated(length)
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
    if settings.backend != "onnxruntime":
        return None
    length = max(settings.decode_lengths)
    planned = subject.num_new
    times: dict[int, list[float]] = {planned: [], 4 * planned: []}
    for _ in range(settings.rounds):
        for num_new, found in times.items():
            subject.num_new = num_new
            subject.prefill()
            subject.pretend_generated(length)
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
        manifest = bundle.read_manifest(folder, verify=False)
        sparsity = manifest.sparsity if name == "sparse" else DENSE_SPARSITY
        subject = SessionSubject(folder, settings, sparsity)
    subject.prefill()
    for _ in range(settings.decode_steps):
        subject.decode()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cell(value: float, base: float) -> str:
    return f"{value:.1f} ({value / base:.2f})"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
