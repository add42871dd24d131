"""Aligned tables of dense beside sparse, as `inspect` and `plan` print them."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["HEADING", "Row", "compare"]

Row = tuple[str, str, str, str]
"""Name, dense, sparse, share."""

HEADING: Row = ("", "dense", "sparse", "share")


def compare(name: str, dense: float, sparse: float, form: Callable[[float], str]) -> Row:
    """Return a row; its share is sparse / dense, `-` where dense is 0.

    Args:
        name: What is compared.
        dense: Value of the dense decoder.
        sparse: Value of the sparse one.
        form: How a value is written.
    """
    share = f"{sparse / dense:.1%}" if dense else "-"
    return name, form(dense), form(sparse), share
