"""Run the benchmark suite: every subject in a process of its own, measured in turns.

    make weights ► every start: load all subjects ► prefill in turns ► at each length: fill,
    decode in turns

What a subject cannot do is written down with the reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from dllava_export.benchmark.geometries import SuiteCase, SuiteGeometry, SuiteSettings
from dllava_export.benchmark.machine import describe_machine, wait_for_idle_threads
from dllava_export.benchmark.predictor_profile import measure_predictor_share
from dllava_export.benchmark.random_model import RandomModel, make_random_model
from dllava_export.benchmark.results import (
    CaseResult,
    GeometryResult,
    SparseFacts,
    SubjectTimes,
    SuiteReport,
)
from dllava_export.benchmark.subject import CONVERTED, DENSE, REFERENCE, SPARSE, SUBJECTS
from dllava_export.benchmark.worker import Worker, make_files, run_alone
from dllava_export.errors import BackendError
from dllava_export.reporting import resources

__all__ = ["run_suite"]

_Show = Callable[[str], None]

_OVERHEAD_STEPS = 40


def run_suite(settings: SuiteSettings | None = None, *, progress: bool = False) -> SuiteReport:
    """Measure all geometries.

    Args:
        settings: What to measure; by default what the published tables hold.
        progress: Show on stderr what is being done.

    Raises:
        BackendError: If this toolkit itself fails; a peer that fails is left out.
    """
    from tqdm import tqdm

    settings = settings or SuiteSettings()
    start = time.perf_counter()
    report = SuiteReport(date.today().isoformat(), describe_machine(), settings, [])
    with tqdm(disable=not progress, bar_format="{desc} [{elapsed}]", leave=False) as bar:
        for geometry in settings.geometries:

            def show(what: str, name: str = geometry.name) -> None:
                bar.set_description_str(f"{name}: {what}")

            with tempfile.TemporaryDirectory(prefix="dllava-bench-") as folder:
                report.geometries.append(
                    _measure_geometry(geometry, settings, Path(folder), show)
                )
    report.seconds = time.perf_counter() - start
    return report


def _measure_geometry(
    geometry: SuiteGeometry, settings: SuiteSettings, folder: Path, show: _Show
) -> GeometryResult:
    show("making random weights")
    with resources.stage(f"{geometry.name}: random weights"):
        model = make_random_model(geometry, settings, folder)
    left_out: dict[str, str] = {}
    with resources.stage(f"{geometry.name}: other formats"):
        for name in CONVERTED:
            show(f"converting for {name}")
            with _leaving_out(name, left_out):
                make_files(name, model)
    show("profiling the predictor")
    with resources.stage(f"{geometry.name}: profile"):
        share = run_alone(measure_predictor_share, model)
    starts = []
    for number in range(geometry.num_starts):
        title = f"start {number + 1} of {geometry.num_starts}"
        with resources.stage(f"{geometry.name}: {title}"):
            names = [name for name in SUBJECTS if name not in left_out]
            with _loaded(names, model, left_out, show) as workers:
                facts = {name: worker.facts for name, worker in workers.items()}
                loaded = {name: worker.memory() for name, worker in workers.items()}
                starts.append(
                    _measure_cases(geometry.cases, workers, settings, left_out, show)
                )
    with resources.stage(f"{geometry.name}: generating {settings.kv_length} tokens"):
        with _loaded((SPARSE, DENSE), model, left_out, show) as workers:
            show(f"generating {settings.kv_length} tokens")
            sparse = _ask_sparse(workers, settings, share)
    cases = [CaseResult.joined(parts) for parts in zip(*starts, strict=True)]
    return GeometryResult(geometry, facts, loaded, cases, sparse, left_out)


@contextlib.contextmanager
def _loaded(
    names: Iterable[str], model: RandomModel, left_out: dict[str, str], show: _Show
) -> Iterator[dict[str, Worker]]:
    """Start a process for each subject; all of them end with the context."""
    workers: dict[str, Worker] = {}
    try:
        with resources.stage("loading"):
            for name in names:
                show(f"loading {name}")
                with _leaving_out(name, left_out):
                    workers[name] = Worker(name, model)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _measure_cases(
    cases: Iterable[SuiteCase],
    workers: dict[str, Worker],
    settings: SuiteSettings,
    left_out: dict[str, str],
    show: _Show,
) -> list[CaseResult]:
    results = []
    for case in cases:
        with resources.stage(f"batch {case.batch_size}"):
            going = {name: w for name, w in workers.items() if name not in left_out}
            results.append(_measure_case(case, going, settings, left_out, show))
    return results


@contextlib.contextmanager
def _leaving_out(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Note why a peer failed; this toolkit must not."""
    try:
        yield
    except BackendError as error:
        if name in (SPARSE, DENSE):
            raise
        left_out[name] = str(error)


def _measure_case(
    case: SuiteCase,
    workers: dict[str, Worker],
    settings: SuiteSettings,
    left_out: dict[str, str],
    show: _Show,
) -> CaseResult:
    """Measure one batch size; a subject that fails loses the results of this case."""
    turns = _Turns(workers, left_out)
    for number in range(case.prefill_rounds):
        show(f"batch {case.batch_size}, prefill, round {number + 1}")
        turns.take(_prefill, case.batch_size)
    if REFERENCE in turns.times:
        turns.take(_compare_logits, workers[REFERENCE].call("logits"))
    turns.take(_note_memory, "prefill")
    for length in settings.decode_lengths:
        show(f"batch {case.batch_size}, filling caches for {length} tokens")
        turns.take(_fill, length)
        for number in range(case.decode_rounds):
            show(f"batch {case.batch_size}, decode at {length}, round {number + 1}")
            turns.take(_decode, length, settings.decode_steps)
    turns.take(_note_memory, "decode")
    return CaseResult(case.batch_size, turns.times)


class _Turns:
    """Lets all subjects act, one after the other; every second time in reverse.

    None always comes after the same one, which may have left the machine warm or busy.

    Attributes:
        times: SuiteSubject → what was measured; one that fails leaves it.
    """

    def __init__(self, workers: dict[str, Worker], left_out: dict[str, str]) -> None:
        self.times = {name: SubjectTimes() for name in workers}
        self._workers, self._left_out = workers, left_out
        self._is_reversed = False

    def take(self, act: Callable[..., None], *args: Any) -> None:
        """Call `act(worker, times, *args)` for every subject."""
        names = list(self.times)
        for name in reversed(names) if self._is_reversed else names:
            wait_for_idle_threads()
            with _leaving_out(name, self._left_out):
                act(self._workers[name], self.times[name], *args)
            if name in self._left_out:
                del self.times[name]
        self._is_reversed = not self._is_reversed


def _prefill(worker: Worker, own: SubjectTimes, batch_size: int) -> None:
    own.prefill_ms.append(1e3 * worker.prefill(batch_size))


def _compare_logits(worker: Worker, own: SubjectTimes, expected: np.ndarray) -> None:
    """Note how far a dense subject is from transformers after the same prompts."""
    if worker.name != SPARSE:
        own.logit_difference = float(np.abs(worker.call("logits") - expected).max())


def _note_memory(worker: Worker, own: SubjectTimes, stage: str) -> None:
    own.memory[stage] = worker.memory()


def _fill(worker: Worker, _: SubjectTimes, num_generated: int) -> None:
    worker.call("fill", num_generated)


def _decode(worker: Worker, own: SubjectTimes, length: int, num_steps: int) -> None:
    median = statistics.median(worker.decode(num_steps))
    own.decode_ms.setdefault(length, []).append(1e3 * median)


def _ask_sparse(
    workers: dict[str, Worker], settings: SuiteSettings, share: float
) -> SparseFacts:
    """Generate tokens with the sparse decoder and count what stays."""
    kv_bytes, kept = workers[SPARSE].call("generate")
    dense_bytes = workers[DENSE].call(
        "kv_bytes", settings.num_prompt_tokens + settings.kv_length
    )
    return SparseFacts(
        kept_share=kept,
        kv_bytes=kv_bytes,
        dense_kv_bytes=dense_bytes,
        decode_overhead=workers[SPARSE].call("overhead", _OVERHEAD_STEPS),
        dense_decode_overhead=workers[DENSE].call("overhead", _OVERHEAD_STEPS),
        predictor_share=share,
    )
