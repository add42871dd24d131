"""What a piece of work took: time, peak memory, bytes written; as a whole and by stage.

Library code marks its stages with `stage`. The marks cost nothing unless somebody measures:

    with measure_resources() as meter:
        export(...)
    print(meter.usage().to_text())
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllava_export.reporting.byte_sizes import format_bytes
from dllava_export.reporting.tables import aligned_lines

__all__ = ["ResourceMeter", "ResourceUsage", "StageUsage", "measure_resources", "stage"]

PROC = Path("/proc/self")
_UNKNOWN = "unknown"
_OTHER = "other"


@dataclasses.dataclass(frozen=True)
class StageUsage:
    """One stage of the work.

    Attributes:
        name: What was done.
        depth: 0 for a stage of its own, 1 for one inside another, and so on.
        seconds: Wall time, stages inside it included.
        rss_bytes: Resident memory when it ended; None where the system does not tell.
        peak_rss_bytes: Peak of the process from its start until the stage ended, or None.
        bytes_written: Bytes handed to the system to write, or None.
    """

    name: str
    depth: int
    seconds: float
    rss_bytes: int | None
    peak_rss_bytes: int | None
    bytes_written: int | None


@dataclasses.dataclass(frozen=True)
class ResourceUsage:
    """What the work took.

    Attributes:
        seconds: Wall time.
        peak_rss_bytes: Peak resident memory of this process since its start, or of the
            largest process it has started and seen end; None where the system does not tell.
        bytes_written: Bytes that this process and those handed to the system to write, what
            went to the terminal included, hard links not; None where it does not tell.
        stages: In the order in which they began.
    """

    seconds: float
    peak_rss_bytes: int | None
    bytes_written: int | None
    stages: tuple[StageUsage, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return values that `json.dumps` takes."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return one line."""
        return (
            f"took {self.seconds:.1f} s; peak RSS {_size(self.peak_rss_bytes)}; "
            f"{_size(self.bytes_written)} written"
        )

    def stages_text(self) -> str:
        """Return a table: a row for each stage, one for the time between them, the total."""
        rows = [("stage", "time", "RSS at end", "peak RSS so far", "written")]
        rows += [
            (
                "  " * entry.depth + entry.name,
                f"{entry.seconds:.2f} s",
                _size(entry.rss_bytes),
                _size(entry.peak_rss_bytes),
                _size(entry.bytes_written),
            )
            for entry in self.stages
        ]
        outer = [entry for entry in self.stages if not entry.depth]
        other_seconds = self.seconds - sum(entry.seconds for entry in outer)
        other_bytes = None
        if self.bytes_written is not None:
            other_bytes = self.bytes_written - sum(e.bytes_written or 0 for e in outer)
        rows += [
            (_OTHER, f"{other_seconds:.2f} s", "", "", _size(other_bytes)),
            (
                "in all",
                f"{self.seconds:.2f} s",
                "",
                _size(self.peak_rss_bytes),
                _size(self.bytes_written),
            ),
        ]
        return "\n".join(aligned_lines(rows))


class ResourceMeter:
    """Counts from its making on. Made by `measure_resources`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._written = _bytes_written()
        # A shell may have turned into this process: children of before are not ours.
        self._children_before = _children_peak_bytes()
        self._stages: list[StageUsage | None] = []
        self._depth = 0

    def usage(self) -> ResourceUsage:
        """Return what was taken so far; stages that have not ended are left out."""
        stages = tuple(entry for entry in self._stages if entry is not None)
        # The kernel's peak is exact to some pages only and may seem to fall.
        peaks = [entry.peak_rss_bytes for entry in stages]
        peaks.append(_peak_rss_bytes(self._children_before))
        return ResourceUsage(
            seconds=time.perf_counter() - self._start,
            peak_rss_bytes=max((peak for peak in peaks if peak is not None), default=None),
            bytes_written=_difference(self._written, _bytes_written()),
            stages=stages,
        )

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block as a stage, also where it raises."""
        start, written = time.perf_counter(), _bytes_written()
        place, depth = len(self._stages), self._depth
        self._stages.append(None)
        self._depth += 1
        try:
            yield
        finally:
            self._depth = depth
            self._stages[place] = StageUsage(
                name=name,
                depth=depth,
                seconds=time.perf_counter() - start,
                rss_bytes=_status_bytes("VmRSS"),
                peak_rss_bytes=_peak_rss_bytes(self._children_before),
                bytes_written=_difference(written, _bytes_written()),
            )


_meter: contextvars.ContextVar[ResourceMeter | None] = contextvars.ContextVar(
    "dllava_export_meter", default=None
)


@contextlib.contextmanager
def measure_resources() -> Iterator[ResourceMeter]:
    """Give a meter that the stages inside the block report to."""
    token = _meter.set(meter := ResourceMeter())
    try:
        yield meter
    finally:
        _meter.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Mark a stage of the work for whoever measures it.

    Args:
        name: What is done, for people: `tracing the decoder`.
    """
    meter = _meter.get()
    with meter.stage(name) if meter is not None else contextlib.nullcontext():
        yield


def _peak_rss_bytes(children_before: int) -> int | None:
    """Return the peak of this process or, if larger, of one that it started and waited for."""
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    # Not ru_maxrss, where Linux has it: that starts from the peak of the parent process.
    own = _status_bytes("VmHWM")
    if own is None:
        own = _unit() * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = _children_peak_bytes()
    return max(own, children) if children > children_before else own


def _children_peak_bytes() -> int:
    """Return the largest peak of processes that this one started and waited for; 0 for none."""
    try:
        import resource
    except ImportError:
        return 0
    return _unit() * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _unit() -> int:
    """Return the bytes in which this system counts `ru_maxrss`."""
    return 1 if sys.platform == "darwin" else 1024


def _status_bytes(field: str) -> int | None:
    """Return a size of /proc/self/status, where there is such a file."""
    return _read_field(PROC / "status", field, unit=1024)


def _bytes_written() -> int | None:
    """Return what this process and its ended children have handed to write calls."""
    return _read_field(PROC / "io", "wchar", unit=1)


def _read_field(path: Path, field: str, *, unit: int) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return unit * int(values[field].split()[0]) if field in values else None


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _size(num_bytes: int | None) -> str:
    return _UNKNOWN if num_bytes is None else format_bytes(num_bytes)
