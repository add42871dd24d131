from __future__ import annotations

import pytest

from dllava_export.evaluation.proportions import Proportion, difference_interval


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # E. B. Wilson's interval as published for these counts: Newcombe 1998, Statistics in
        # Medicine 17, 857-872, table I (method 3).
        pytest.param(81, 263, 0.2553, 0.3662, id="81 of 263"),
        pytest.param(15, 148, 0.0624, 0.1605, id="15 of 148"),
        pytest.param(0, 20, 0.0, 0.1611, id="none"),
        pytest.param(1, 29, 0.0061, 0.1718, id="1 of 29"),
        # By symmetry of the last but one, and z² / (n + z²) = 3.8415 / 23.8415 = 0.1611.
        pytest.param(20, 20, 0.8389, 1.0, id="all"),
    ],
)
def test_wilson_against_known_values(count, total, low, high):
    assert Proportion(count, total).interval == pytest.approx((low, high), abs=5e-5)


def test_partly_right_answers_count_by_their_share():
    found = Proportion(1.5, 2)
    assert found.share == 0.75
    # w = 1.9207: ((.75 + w/2) ± sqrt(.1875 w + w²/4)) / (1 + w)
    # = (1.7104 ± 1.1326) / 2.9207
    assert found.interval == pytest.approx((0.1978, 0.9734), abs=2e-4)


def test_nothing_has_no_share():
    assert (Proportion(0, 0).share, Proportion(0, 0).interval) == (None, None)


def test_difference_against_known_values():
    # Newcombe 1998, Statistics in Medicine 17, 873-890, table II (a), method 10.
    found = difference_interval(Proportion(56, 70), Proportion(48, 80))
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference_interval(Proportion(1, 2), Proportion(0, 0)) is None
