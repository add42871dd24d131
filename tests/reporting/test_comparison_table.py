from __future__ import annotations

from dllava_export.reporting.comparison_table import HEADING, compare, table_lines


def test_row_has_the_share_of_sparse():
    assert compare("rows", 640, 179, str) == ("rows", "640", "179", "28.0%")


def test_row_has_no_share_of_nothing():
    assert compare("predictor", 0, 5, str) == ("predictor", "0", "5", "-")


def test_lines_are_aligned():
    assert table_lines([HEADING, ("rows", "640", "179", "28.0%")]) == [
        "      dense  sparse  share",
        "rows    640     179  28.0%",
    ]
