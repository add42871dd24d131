"""What the suite finds, as plain values."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from dllava_export.benchmark.geometries import SuiteGeometry, SuiteSettings
from dllava_export.benchmark.worker import Memory, SubjectFacts

__all__ = [
    "CaseResult",
    "GeometryResult",
    "SparseFacts",
    "Spread",
    "SubjectTimes",
    "SuiteReport",
    "ratio",
]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and extremes of what several rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return it for at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


def ratio(values: list[float], base: list[float]) -> Spread:
    """Return values / base, round by round: a slow moment of the machine hits both."""
    return Spread.of(v / b for v, b in zip(values, base, strict=True))


@dataclasses.dataclass
class SubjectTimes:
    """One subject at one batch size; a list has a value per round.

    Attributes:
        prefill_ms: Time of a prefill.
        decode_ms: Generated tokens in the cache → median time of a round's steps.
        logit_difference: Largest difference of the prefill's logits from those of transformers
            with its dynamic cache; None for pruned prompts and where that was not run.
        memory: After a prefill, and after the decode steps at the largest length.
    """

    prefill_ms: list[float] = dataclasses.field(default_factory=list)
    decode_ms: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    logit_difference: float | None = None
    memory: dict[str, Memory] = dataclasses.field(default_factory=dict)

    def add(self, other: SubjectTimes) -> None:
        """Append the rounds of another start; the memory is that of the last one."""
        self.prefill_ms += other.prefill_ms
        for length, values in other.decode_ms.items():
            self.decode_ms[length] = self.decode_ms.get(length, []) + values
        if other.logit_difference is not None:
            self.logit_difference = max(self.logit_difference or 0.0, other.logit_difference)
        self.memory = other.memory


@dataclasses.dataclass
class CaseResult:
    """One batch size.

    Attributes:
        batch_size: Samples.
        times: Subject → what it took.
    """

    batch_size: int
    times: dict[str, SubjectTimes]

    @classmethod
    def joined(cls, starts: Sequence[CaseResult]) -> CaseResult:
        """Return the rounds of all starts; a subject that failed in one of them is left out."""
        first, *others = starts
        names = [name for name in first.times if all(name in o.times for o in others)]
        times = {name: SubjectTimes() for name in names}
        for start in starts:
            for name in names:
                times[name].add(start.times[name])
        return cls(first.batch_size, times)


@dataclasses.dataclass(frozen=True)
class SparseFacts:
    """What only the sparse decoder is asked, at batch 1.

    Attributes:
        kept_share: Of `kv_length` generated tokens, those whose keys and values stay.
        kv_bytes: Of the caches from `sparse_layer` on after them.
        dense_kv_bytes: The same of the dense decoder.
        decode_overhead: Share of a decode step that is not spent inside ONNX Runtime.
        dense_decode_overhead: The same of the dense decoder.
        predictor_share: Share of a prefill that the image predictor and the selection take.
    """

    kept_share: float
    kv_bytes: int
    dense_kv_bytes: int
    decode_overhead: float
    dense_decode_overhead: float
    predictor_share: float


@dataclasses.dataclass
class GeometryResult:
    """One decoder.

    Attributes:
        geometry: Its sizes.
        subjects: Name → what the subject says of itself.
        loaded: Name → memory when it was loaded.
        cases: By batch size.
        sparse: What only the sparse decoder is asked.
        left_out: Name → why it is not, or not wholly, measured.
    """

    geometry: SuiteGeometry
    subjects: dict[str, SubjectFacts]
    loaded: dict[str, Memory]
    cases: list[CaseResult]
    sparse: SparseFacts
    left_out: dict[str, str]


@dataclasses.dataclass
class SuiteReport:
    """One run of the suite.

    Attributes:
        date: ISO date of the start.
        machine: What it ran on: `processor`, `cores`, `memory_bytes`, `system`, `python`.
        settings: What was measured.
        geometries: Results.
        seconds: Wall time of the run.
    """

    date: str
    machine: dict[str, Any]
    settings: SuiteSettings
    geometries: list[GeometryResult]
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return dataclasses.asdict(self)
