from __future__ import annotations

import numpy as np
import pytest
import tolerances

from dllava_export.validation.selection_checks import (
    check_keep,
    check_kept_images,
    image_margins,
)

SCORES = np.array([-1.0, -3.0, -2.0, -2.001, -5.0], np.float32)


def rows(*indices):
    return np.array(indices, np.int64)


def test_margins_are_distances_from_where_selection_ends():
    np.testing.assert_allclose(
        image_margins(SCORES, 2),
        [1.0005, 0.9995, 0.0005, 0.0005, 2.9995],
        atol=tolerances.MASKED,
    )


@pytest.mark.parametrize("num_kept", [0, 5])
def test_keeping_all_or_none_leaves_no_near_tie(num_kept):
    assert np.isinf(image_margins(SCORES, num_kept)).all()


def test_equal_sets_match():
    check = check_kept_images(rows(0, 2), rows(0, 2), SCORES, 0.0)
    assert check
    assert check.detail == "the same 2 image rows"


def test_a_near_tie_is_allowed():
    check = check_kept_images(rows(0, 3), rows(0, 2), SCORES, 1e-3)
    assert check
    assert check.detail == (
        "1 of 2 flips, all at margins under 0.001 (largest 0.0005); kept only here 3, only "
        "there 2"
    )


@pytest.mark.parametrize(
    ("found", "scores", "margin"),
    [
        pytest.param(rows(0, 3), SCORES, 1e-4, id="margin too large"),
        pytest.param(rows(0, 4), SCORES, 1e-3, id="one of two margins too large"),
        pytest.param(rows(0), SCORES, 1e-3, id="one row less"),
        pytest.param(rows(0, 2, 3), SCORES, 1e-3, id="one row more"),
        pytest.param(rows(0, 3), None, 1e-3, id="no scores to judge by"),
        pytest.param(rows(0, 3), SCORES * np.nan, 1e-3, id="scores that are no numbers"),
    ],
)
def test_other_flips_are_errors(found, scores, margin):
    assert not check_kept_images(found, rows(0, 2), scores, margin)


@pytest.mark.parametrize(
    ("margin", "is_match", "detail"),
    [
        (-0.01, True, "kept, expected dropped, all at margins under 0.02 (largest 0.01)"),
        (-0.5, False, "kept, expected dropped, at margins up to 0.5 (allowed 0.02)"),
        (None, False, "kept, expected dropped"),
    ],
)
def test_a_keep_bit_may_differ_in_a_near_tie(margin, is_match, detail):
    check = check_keep("decode.3", True, False, margin, 0.02)
    assert (bool(check), check.place, check.detail) == (is_match, "decode.3/keep", detail)


def test_equal_keep_bits_match():
    check = check_keep("decode.0", False, False, None, 0.0)
    assert check
    assert check.detail == "dropped"
