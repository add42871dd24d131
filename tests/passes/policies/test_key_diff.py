from __future__ import annotations

import numpy as np
import tolerances
from policy_graphs import ScoreGraph, assert_nodes, image_feeds

from dllava_export.passes.policies.key_diff import KeyDiffPolicy

KEY_DIFF = KeyDiffPolicy()


def test_nodes() -> None:
    assert_nodes(
        "key-diff",
        """
    key = Cast <to = 1> (kr0)
    key_heads = Reshape (key, split)
    length = ReduceL2 <keepdims = 1> (key_heads, last_axis)
    divisor = Max (length, shortest)
    unit = Div (key_heads, divisor)
    is_image = Equal (token_kind, two)
    is_image_4d = Unsqueeze (is_image, axes_2_3)
    image_unit = Where (is_image_4d, unit, nothing)
    total = ReduceSum <keepdims = 1> (image_unit, axis_1)
    total_length = ReduceL2 <keepdims = 1> (total, last_axis)
    total_divisor = Max (total_length, shortest)
    anchor = Div (total, total_divisor)
    product = Mul (unit, anchor)
    cosine = ReduceSum <keepdims = 0> (product, last_axis)
    mean = ReduceMean <keepdims = 0> (cosine, last_axis)
    scores = Neg (mean)
""",
        ", int64[4] split = {0, 0, 1, 8}, int64[2] axes_2_3 = {2, 3}, float nothing = {0}, "
        "float shortest = {1e-12}",
    )


def test_the_odd_key_scores_highest() -> None:
    feeds = image_feeds([[1, 2, 2, 2, 1]])
    feeds["key"][:] = 0
    feeds["key"][0, :, [0, 8]] = 7  # text rows too, which make no mean
    feeds["key"][0, 2] = 0
    feeds["key"][0, 2, [1, 9]] = 0.1  # short, and at right angles
    scores = ScoreGraph(KEY_DIFF)(feeds)[0, 1:4]
    expected = -np.array([2, 1, 2]) / np.sqrt(5)
    np.testing.assert_allclose(scores, expected, atol=tolerances.MASKED)


def test_keys_of_zeros_have_a_score() -> None:
    feeds = image_feeds([[1, 2, 2, 1]])
    feeds["key"][:] = 0
    assert ScoreGraph(KEY_DIFF)(feeds)[0].tolist() == [0, 0, 0, 0]
