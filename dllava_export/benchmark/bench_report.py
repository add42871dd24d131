"""What `bench` measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from dllava_export.benchmark.bench_settings import BenchSettings
from dllava_export.reporting.tables import aligned_lines

__all__ = ["BenchReport", "Measurement"]


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
        settings = self.settings
        return "\n".join(
            [
                f"{self.machine}; {settings.num_threads} threads, batch {settings.batch_size}, "
                f"prompt of {settings.prompt_text_len} text tokens and one image",
                "times in ms, medians of "
                f"{settings.rounds} interleaved rounds; in brackets: times as long as sparse",
                *aligned_lines(rows),
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


def _cell(value: float, base: float) -> str:
    return f"{value:.1f} ({value / base:.2f})"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
