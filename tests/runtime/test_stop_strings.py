from __future__ import annotations

import itertools

import pytest

from dllava_export.runtime.stop_strings import StopStrings


def shown(stops, pieces):
    """What each piece lets through, what is left at the end, and what was found."""
    found = StopStrings(stops)
    return [found.push(piece) for piece in pieces], found.flush(), found.found


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        pytest.param([], ["a", "b"], (["a", "b"], "", None), id="no stops"),
        pytest.param(["x"], ["ab", "cd"], (["ab", "cd"], "", None), id="not there"),
        pytest.param(["b"], ["abc", "d"], (["a", ""], "", "b"), id="inside a token"),
        pytest.param(
            ["USER:"],
            ["Yes. ", "US", "ER", ": no"],
            (["Yes. ", "", "", ""], "", "USER:"),
            id="across tokens",
        ),
        pytest.param(
            ["USER:"],
            ["US", "A is"],
            (["", "USA is"], "", None),
            id="held back, then clear",
        ),
        pytest.param(["USER:"], ["the US"], (["the "], "US", None), id="held back at the end"),
        pytest.param(["aab"], ["aa", "ab"], (["", "a"], "", "aab"), id="begins anew"),
        pytest.param(["cd", "b"], ["abcd"], (["a"], "", "b"), id="the first of several"),
        pytest.param(["bc", "bcd"], ["a", "bcd"], (["a", ""], "", "bc"), id="same place"),
        pytest.param(["\n\n"], ["a\n", "b\n\nc"], (["a", "\nb"], "", "\n\n"), id="lines"),
    ],
)
def test_text_ends_before_a_stop_string(stops, pieces, expected):
    assert shown(stops, pieces) == expected


@pytest.mark.parametrize("stops", [["abab"], ["ba", "aab"], ["b"]])
def test_how_text_is_cut_into_tokens_makes_no_difference(stops):
    text = "aabaabab"
    whole = shown(stops, [text])
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        pieces = [""]
        for letter, is_cut in zip(text, [False, *cuts], strict=True):
            if is_cut:
                pieces.append("")
            pieces[-1] += letter
        parts, rest, found = shown(stops, pieces)
        assert "".join(parts) + rest == "".join(whole[0]) + whole[1]
        assert found == whole[2]
