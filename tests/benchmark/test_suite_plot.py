from __future__ import annotations

import pytest

from dllava_export.benchmark.plot import bar_label, subject_colour
from dllava_export.benchmark.subject import SUBJECTS


def test_subjects_have_colours_of_their_own():
    assert len({subject_colour(name) for name in SUBJECTS}) == len(SUBJECTS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(1254.6, " 1255", id="large"),
        pytest.param(20.84, " 20.8", id="middle"),
        pytest.param(0.786, " 0.786", id="small"),
    ],
)
def test_labels_have_three_digits_or_no_point(value, text):
    assert bar_label(value) == text
