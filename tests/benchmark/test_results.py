from __future__ import annotations

import pytest

from dllava_export.benchmark.results import CaseResult, Spread, SubjectTimes, ratio
from dllava_export.benchmark.worker import Memory


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


def times(prefill: float, decode: float, difference: float | None) -> SubjectTimes:
    memory = {"prefill": Memory(1, int(prefill))}
    return SubjectTimes([prefill], {0: [decode], 512: [2 * decode]}, difference, memory)


def test_starts_are_joined_round_by_round():
    first = CaseResult(4, {"ours": times(1.0, 2.0, None), "peer": times(3.0, 4.0, 0.5)})
    second = CaseResult(4, {"peer": times(5.0, 6.0, 0.25), "ours": times(7.0, 8.0, None)})
    joined = CaseResult.joined([first, second])
    memory = {"prefill": Memory(1, 7)}
    assert joined.batch_size == 4
    assert list(joined.times) == ["ours", "peer"]
    assert joined.times["ours"] == SubjectTimes(
        [1.0, 7.0], {0: [2.0, 8.0], 512: [4.0, 16.0]}, None, memory
    )
    assert joined.times["peer"].logit_difference == 0.5
    assert first.times["ours"].prefill_ms == [1.0]


def test_subject_that_failed_in_one_start_has_no_result():
    whole = CaseResult(1, {"ours": times(1.0, 2.0, None), "peer": times(3.0, 4.0, None)})
    part = CaseResult(1, {"ours": times(1.0, 2.0, None)})
    assert list(CaseResult.joined([whole, part]).times) == ["ours"]
