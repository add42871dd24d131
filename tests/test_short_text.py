from __future__ import annotations

import pytest

from dllava_export.short_text import shortened


@pytest.mark.parametrize(
    ("value", "length", "expected"),
    [
        pytest.param("a\n  b\tc", 60, "a b c", id="one line"),
        pytest.param("x" * 60, 60, "x" * 60, id="fits"),
        pytest.param("x" * 61, 60, "x" * 57 + "...", id="cut"),
        pytest.param([1, 2, 3], 6, "[1,...", id="a list"),
        pytest.param(KeyError(), 60, "", id="nothing to say"),
    ],
)
def test_values_as_short_texts(value, length, expected):
    assert shortened(value, length) == expected
