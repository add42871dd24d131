"""Plain tables: columns of equal width."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned_lines"]


def aligned_lines(rows: Sequence[Sequence[str]], num_left: int = 1) -> list[str]:
    """Return a line per row, two spaces between columns.

    Args:
        rows: Cells; as many in each row.
        num_left: Columns that stand to the left; the others stand to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < num_left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
