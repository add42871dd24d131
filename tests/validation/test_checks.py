from __future__ import annotations

import json

import numpy as np
import pytest

from dllava_export.validation.checks import (
    DRIFT,
    MATCH,
    MISMATCH,
    Check,
    compare_rows,
    compare_values,
    cosine,
)
from dllava_export.validation.settings import Tolerances

LOOSE = Tolerances(rtol=0.01, atol=0.1, check_error_stat="elemwise", margin=0)
TIGHT = Tolerances(rtol=0.01, atol=0.0, check_error_stat="elemwise", margin=0)
ROW = np.array([3.0, 4.0], np.float32)


def values(found, expected, tolerances=LOOSE, judged=True):
    a, b = np.float32(found), np.float32(expected)
    return compare_values("prefill", "logits", a, b, tolerances, judged=judged)


def by_rows(found, expected, tolerances=TIGHT, judged=True):
    a, b = np.float32(found), np.float32(expected)
    return compare_rows("prefill", "layers.0/key", a, b, tolerances, judged=judged)


def test_numbers_are_measured():
    check = values([3.0, 4.5], ROW)
    assert check.max_abs == 0.5
    assert check.relative == pytest.approx(0.1)
    assert check.cosine == pytest.approx(27 / (5 * np.hypot(3, 4.5)))


@pytest.mark.parametrize(
    ("found", "stat", "verdict"),
    [
        ([3.05, 4.0], "elemwise", MATCH),  # below atol
        ([3.2, 4.0], "elemwise", MISMATCH),
        ([3.2, 4.0], "max", MISMATCH),
        ([3.1, 4.0], "mean", MATCH),  # the mean is 0.05
        ([np.nan, 4.0], "elemwise", MISMATCH),
        ([np.nan, 4.0], "max", MISMATCH),
    ],
)
def test_error_statistics_are_polygraphys(found, stat, verdict):
    tolerances = Tolerances(0.01, 0.1, stat, 0)
    assert values(found, ROW, tolerances).verdict == verdict


def test_shapes_must_agree():
    check = values([3.0], ROW)
    assert check.verdict == MISMATCH
    assert check.detail == "shape [1], expected [2]"


def test_what_is_not_judged_is_drift():
    assert values([9.0, 4.0], ROW, judged=False).verdict == DRIFT
    assert by_rows([[9.0, 4.0]], [ROW], judged=False).verdict == DRIFT


def test_rows_are_judged_as_a_whole():
    # The small element is off by a hundredfold, which is little beside the row's length.
    assert by_rows([[0.1, 100.0]], [[0.001, 100.0]])
    check = by_rows([[0.1, 100.0], [3.0, 4.0], [3.0, 5.0]], [[0.1, 100.0], ROW, ROW])
    assert check.verdict == MISMATCH
    assert check.detail == "1 of 3 rows are off"


def test_a_small_row_may_be_off_by_atol():
    found, expected = [[0.05, 0.0]], [[0.001, 0.0]]
    assert by_rows(found, expected, LOOSE)
    assert not by_rows(found, expected, TIGHT)


def test_rows_that_are_no_numbers_mismatch():
    assert not by_rows([[np.nan, 4.0]], [ROW], LOOSE)


def test_no_rows_match():
    assert by_rows(np.zeros((0, 2)), np.zeros((0, 2))).max_abs == 0


def test_cosine_of_zeros_is_one():
    assert cosine(np.zeros(2), np.zeros(2)) == 1
    assert cosine(np.float32([1, 0]), np.float32([0, 1])) == 0


def test_json_holds_no_nan():
    text = json.dumps(Check("cache", "layers.0/key", MATCH, float("nan")).to_json())
    assert json.loads(text)["max_abs"] == "nan"
    assert "NaN" not in text
