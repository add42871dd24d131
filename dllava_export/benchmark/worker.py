"""One subject in a process of its own, so that nothing but the processor is shared."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from dllava_export.benchmark.random_model import RandomModel
from dllava_export.benchmark.subject import SuiteSubject, subject_class
from dllava_export.errors import BackendError
from dllava_export.reporting.resources import ResourceMeter

__all__ = ["Memory", "SubjectFacts", "Worker", "make_files", "run_alone"]

_Result = TypeVar("_Result")

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Of the worker's process.
_subject: SuiteSubject | None = None


@dataclasses.dataclass(frozen=True)
class SubjectFacts:
    """What a subject says of itself.

    Attributes:
        version: Packages that compute, with versions.
        notes: How it is run.
    """

    version: str
    notes: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Resident memory of a subject's process.

    Attributes:
        rss_bytes: Now; None where the system does not tell.
        peak_rss_bytes: The peak since the process began, or None.
    """

    rss_bytes: int | None
    peak_rss_bytes: int | None


class Worker:
    """A process with one subject.

    Args:
        name: Of the subject.
        model: What it loads.

    Raises:
        BackendError: If the subject cannot be opened; the message is the reason.
    """

    def __init__(self, name: str, model: RandomModel) -> None:
        self.name = name
        self._pool = _new_process()
        try:
            self.facts = _result(self._pool, _limited, _open, model, name)
        except BackendError:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)

    def prefill(self, batch_size: int) -> float:
        """Return the seconds of one prefill."""
        return _result(self._pool, _prefill, batch_size)

    def decode(self, num_steps: int) -> list[float]:
        """Return the seconds of decode steps; one more that is not timed comes before them."""
        return _result(self._pool, _decode, num_steps)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the subject."""
        return _result(self._pool, _call, method, *args)

    def memory(self) -> Memory:
        """Return the memory of the process."""
        return _result(self._pool, _memory)


def make_files(name: str, model: RandomModel) -> None:
    """Let a subject write what it loads, in a process that ends: its memory is not counted.

    Raises:
        BackendError: If that fails; the message is the reason.
    """
    run_alone(_make_files, model, name)


def run_alone(function: Callable[..., _Result], model: RandomModel, *args: Any) -> _Result:
    """Call `function(model, *args)` in a process of its own.

    Args:
        function: Of a module: the process imports it.
        model: Its first argument; says how many threads there are.
        args: The others.

    Raises:
        BackendError: If it fails.
    """
    with _new_process() as pool:
        return _result(pool, _limited, function, model, *args)


def _new_process() -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context)


def _result(
    pool: concurrent.futures.ProcessPoolExecutor, function: Callable[..., _Result], *args: Any
) -> _Result:
    """Run a function in the process of `pool`."""
    try:
        return pool.submit(_with_plain_errors, function, *args).result()
    except BrokenProcessPool as error:
        raise BackendError(
            "its process ended: it crashed, or was killed for want of memory"
        ) from error


def _with_plain_errors(function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function; other packages' errors may not survive the way between processes."""
    try:
        return function(*args)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"{type(error).__name__}: {error}") from error


def _limited(function: Callable[..., _Result], model: RandomModel, *args: Any) -> _Result:
    """Call a function after setting what libraries read when they are imported."""
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(model.settings.num_threads)))
    return function(model, *args)


def _make_files(model: RandomModel, name: str) -> None:
    subject_class(name).make_files(model)


def _open(model: RandomModel, name: str) -> SubjectFacts:
    global _subject
    _subject = subject_class(name)(model)
    # Weights are read and packed when they are first used.
    _subject.prepare(1)
    _subject.prefill()
    return SubjectFacts(_subject.version, _subject.notes)


def _prefill(batch_size: int) -> float:
    assert _subject is not None  # `_open` came first
    _subject.prepare(batch_size)
    start = time.perf_counter()
    _subject.prefill()
    return time.perf_counter() - start


def _decode(num_steps: int) -> list[float]:
    assert _subject is not None
    _subject.decode()
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        _subject.decode()
        seconds.append(time.perf_counter() - start)
    return seconds


def _call(method: str, *args: Any) -> Any:
    return getattr(_subject, method)(*args)


def _memory() -> Memory:
    meter = ResourceMeter()
    with meter.stage("now"):
        pass
    (entry,) = meter.usage().stages
    return Memory(entry.rss_bytes, entry.peak_rss_bytes)
