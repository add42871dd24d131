"""The one reader of JSON: it refuses what would fail later, somewhere else, without a word."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["MAX_DEPTH", "parse_json"]

MAX_DEPTH = 100
"""Objects and lists inside each other; more is no file that anybody's tool writes."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text; bytes are UTF-8, with or without a byte order mark.
        unique_keys: Refuse an object that has a key twice, instead of taking the last one.

    Raises:
        ValueError: If it is no JSON, is nested deeper than `MAX_DEPTH`, or holds half of a
            surrogate pair, which no file can be written with.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    pairs_hook = _object_of_unique_keys if unique_keys else None
    try:
        value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=pairs_hook)
    except RecursionError as error:
        raise _too_deep() from error
    _check(value)
    return value


def _too_deep() -> ValueError:
    return ValueError(f"nested deeper than the limit of {MAX_DEPTH} levels")


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


def _check(value: Any) -> None:
    """Check depth and texts, level by level."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key)
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    if any(isinstance(item, dict | list) for item in level):
        raise _too_deep()


def _check_text(text: str) -> None:
    if not text.isascii() and _SURROGATE.search(text):
        raise ValueError(f"half of a surrogate pair in {text[:60]!a}")
