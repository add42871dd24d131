"""What machine results were measured on."""

from __future__ import annotations

import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "machine_line", "wait_for_idle_threads"]

_SPIN_SECONDS = 0.05


def describe_machine() -> dict[str, Any]:
    """Return `processor`, `cores`, `memory_bytes` (0 where unknown), `system` and `python`."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def machine_line() -> str:
    """Return processor, number of cores and date, as small results are labelled."""
    return f"{_processor()}, {os.cpu_count() or 1} cores, {date.today().isoformat()}"


def wait_for_idle_threads() -> None:
    """Wait until idle threads of a runtime have stopped spinning: they take a core's time."""
    time.sleep(_SPIN_SECONDS)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 0
