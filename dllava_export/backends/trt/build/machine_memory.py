"""How much memory this machine has left for a build."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Return the bytes a process can still take, or None where the system does not tell.

    On Linux that is `MemAvailable`, or what the container's limit leaves if it is less.

    Args:
        meminfo: The kernel's table of memory.
        cgroup: Folder of the container's limits, version 2.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        machine = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        left = limit - int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # "max" stands for no limit
        return machine
    return min(machine, max(left, 0))
