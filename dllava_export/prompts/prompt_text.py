"""Prompts as callers give them: text that can be tokenised, or refused."""

from __future__ import annotations

from typing import Any

from dllava_export.errors import InvalidInputError

__all__ = ["checked_text"]


def checked_text(prompt: Any, what: str) -> str:
    """Return a prompt.

    Args:
        prompt: What was given as one.
        what: Its name, for messages.

    Raises:
        InvalidInputError: If it is no text, or has half of a surrogate pair, which is no
            character and has no tokens.
    """
    if not isinstance(prompt, str):
        raise InvalidInputError(
            f"{what} is {type(prompt).__name__}, expected text. Pass a string, or input_ids."
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{what} has {prompt[error.start]!r} at {error.start}, half of a surrogate pair; "
            "expected whole characters. Decode the text it comes from as UTF-8."
        ) from error
    return prompt
