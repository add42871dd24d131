from __future__ import annotations

from dllava_export.reporting.comparison_table import HEADING, compare
from dllava_export.reporting.tables import aligned_lines


def test_row_has_the_share_of_sparse():
    assert compare("rows", 640, 179, str) == ("rows", "640", "179", "28.0%")


def test_row_has_no_share_of_nothing():
    assert compare("predictor", 0, 5, str) == ("predictor", "0", "5", "-")


def test_lines_are_aligned():
    assert aligned_lines([HEADING, ("rows", "640", "179", "28.0%")]) == [
        "      dense  sparse  share",
        "rows    640     179  28.0%",
    ]
