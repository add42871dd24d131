"""Values and other libraries' errors as short texts on one line, for messages."""

from __future__ import annotations

__all__ = ["shortened"]


def shortened(value: object, length: int = 60) -> str:
    """Return a value as text on one line, of at most `length` characters.

    Args:
        value: What `str` gives is shown.
        length: From 4 on; a text that is cut ends with three dots.
    """
    text = " ".join(str(value).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
