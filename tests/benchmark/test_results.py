from __future__ import annotations

import pytest

from dllava_export.benchmark.results import Spread, ratio


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        pytest.param([3.0, 1.0, 2.0], Spread(2.0, 1.0, 3.0), id="odd"),
        pytest.param([4.0, 1.0], Spread(2.5, 1.0, 4.0), id="even"),
        pytest.param([7.0], Spread(7.0, 7.0, 7.0), id="one"),
    ],
)
def test_spread_is_median_and_extremes(values, spread):
    assert Spread.of(values) == spread


def test_ratio_is_taken_round_by_round():
    # The medians' own ratio would be 20 / 10.
    assert ratio([10.0, 20.0, 90.0], [10.0, 40.0, 9.0]) == Spread(1.0, 0.5, 10.0)


def test_ratio_needs_the_same_rounds():
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])
