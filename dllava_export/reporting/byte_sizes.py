"""Bytes as people write them: `24GiB` to a number, a number to `24.00 GiB`."""

from __future__ import annotations

import re

from dllava_export.errors import SettingError

__all__ = ["byte_unit", "format_bytes", "parse_bytes"]

_BINARY = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_FACTORS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Return the bytes in `24GiB`, `16 GB` or `80.5 gib`: 2^30 bytes to a GiB, 10^9 to a GB.

    Raises:
        SettingError: If it is not a number above 0 with a unit.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match is not None else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise SettingError(
            f"{text!r} is no size; expected a number above 0 and a unit, such as 24GiB "
            "(2^30 bytes) or 16GB (10^9 bytes). Units: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB."
        )
    return int(float(match[1]) * factor)


def format_bytes(num_bytes: float) -> str:
    """Return a size in the largest binary unit that it fills: `1.5 KiB`, `12.57 GiB`."""
    unit, size = byte_unit(num_bytes)
    decimals = {"bytes": 0, "GiB": 2}.get(unit, 1)
    return f"{num_bytes / size:.{decimals}f} {unit}"


def byte_unit(num_bytes: float) -> tuple[str, int]:
    """Return the largest binary unit that a size fills: name and bytes."""
    for name, size in _BINARY:
        if num_bytes >= size:
            return name, size
    return "bytes", 1
