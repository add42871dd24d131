from __future__ import annotations

import numpy as np
import pytest
import tolerances
from policy_graphs import (
    PAID_CONSTANTS,
    PAID_NODES,
    PROMPT_ROW_NODES,
    ScoreGraph,
    assert_nodes,
    image_arrays,
    image_feeds,
    reference_scores,
)

from dllava_export.geometry import Geometry
from dllava_export.passes.policies.attention import AttentionPolicy
from dllava_export.passes.policies.paid_attention import paid_attention_arrays

ATTENTION = AttentionPolicy()
SIZES = Geometry(3, 8, 12, 4, 2, 16, 11, num_image_tokens=10)


def test_nodes() -> None:
    window = ", ".join(map(str, range(64)))
    is_last = ", ".join(["1"] + ["0"] * 63)
    assert_nodes(
        "attention",
        f"""
    {PROMPT_ROW_NODES}
    last_row = ReduceMax <keepdims = 1> (prompt_row, axis_1)
    window_row = Sub (last_row, "layers.1/select_image/attention/rows_back")
    window_index = Max (window_row, zero)
    window_kind = ai.dllava.GatherTokens (token_kind, window_index)
    window_is_text = Equal (window_kind, one)
    reads = Or (window_is_text, "layers.1/select_image/attention/is_last")
    reader = Where (reads, window_row, none)
    {PAID_NODES}
    counted_paid = Where (visible, paid, nothing)
    total = ReduceSum <keepdims = 0> (counted_paid, axis_1)
    counted_reads = Cast <to = 1> (visible)
    number = ReduceSum <keepdims = 0> (counted_reads, axis_1)
    divisor = Max (number, one_float)
    scores = Div (total, divisor)
""",
        PAID_CONSTANTS + ", float nothing = {0}, float one_float = {1}, int64 none = {-1}, "
        f'int64[64] "layers.1/select_image/attention/rows_back" = {{{window}}}, '
        f'bool[64] "layers.1/select_image/attention/is_last" = {{{is_last}}}',
    )


@pytest.mark.parametrize(
    ("kinds", "readers"),
    [
        pytest.param([1, 2, 2, 1, 1, 1], [3, 4, 5], id="question behind the image"),
        pytest.param([1, 1, 1, 2, 2, 1], [5], id="question before the image"),
        pytest.param([1, 2, 2], [2], id="image at the end"),
        pytest.param([2, 2, 1, 2, 2, 1, 1], [2, 5, 6], id="text between images"),
        pytest.param([2, 2, 1, 1, 3, 3], [2, 3], id="answer"),
    ],
)
def test_text_behind_the_image_is_asked(kinds: list[int], readers: list[int]) -> None:
    feeds = image_feeds([kinds])
    before = ScoreGraph(ATTENTION)(feeds)[0]
    image = np.flatnonzero(np.array(kinds) == 2)
    for row in range(len(kinds)):
        feeds = image_feeds([kinds])
        feeds["query"][0, row] *= -1
        after = ScoreGraph(ATTENTION)(feeds)[0]
        seen = image[image <= row]
        assert (after[seen] != before[seen]).any() == (row in readers and seen.size > 0)
        assert (after[image[image > row]] == before[image[image > row]]).all()


def test_is_the_mean_over_the_rows_that_see_a_row() -> None:
    kinds = [2, 2, 1, 2, 1, 1]
    feeds = image_feeds([kinds])
    arrays = image_arrays(feeds, 0, np.array([0, 1, 3]), 3)
    between, *behind = paid_attention_arrays(arrays.attention, np.array([2, 4, 5]))
    expected = [
        (between[0] + behind[0][0] + behind[1][0]) / 3,
        (between[1] + behind[0][1] + behind[1][1]) / 3,
        (behind[0][3] + behind[1][3]) / 2,
    ]
    (found,) = reference_scores(ATTENTION, [kinds], feeds=feeds)
    np.testing.assert_allclose(found, expected, atol=tolerances.MASKED)


def test_a_long_question_is_read_by_its_end() -> None:
    kinds = [2, 2, 2, *[1] * 70]
    feeds = image_feeds([kinds])
    before = ScoreGraph(ATTENTION)(feeds)[0, :3]
    feeds["query"][0, 3:9] = 5  # 64 rows stand behind these
    assert ScoreGraph(ATTENTION)(feeds)[0, :3].tolist() == before.tolist()
    feeds["query"][0, 9] = 5
    assert (ScoreGraph(ATTENTION)(feeds)[0, :3] != before).any()


def test_another_question_keeps_other_rows() -> None:
    kinds = [[1, *[2] * 30, 1, 1, 1]]
    first, second = image_feeds(kinds), image_feeds(kinds)
    second["query"][0, 31:] = image_feeds(kinds, seed=9)["query"][0, 31:]
    best = [set(np.argsort(-ScoreGraph(ATTENTION)(f)[0, 1:31])[:6]) for f in (first, second)]
    assert best[0] != best[1]


def test_counts_its_product() -> None:
    assert ATTENTION.image_flops(SIZES) == 2 * 64 * 10 * 4 * 16
