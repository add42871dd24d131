from __future__ import annotations

import pytest

from dllava_export.errors import InvalidInputError
from dllava_export.prompts.prompt_text import checked_text


@pytest.mark.parametrize("text", ["", "What is this?", "😀 ü 猫", "\ufffd"])
def test_takes_text(text):
    assert checked_text(text, "Prompt 0") == text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "Prompt 0 is NoneType, expected text"),
        (b"w5", "Prompt 0 is bytes, expected text"),
        (5, "Prompt 0 is int, expected text"),
        ("ab\ud83d", r"Prompt 0 has '\\ud83d' at 2, half of a surrogate pair"),
    ],
)
def test_refuses_what_is_no_text(prompt, message):
    with pytest.raises(InvalidInputError, match=message):
        checked_text(prompt, "Prompt 0")
