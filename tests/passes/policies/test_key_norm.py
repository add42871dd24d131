from __future__ import annotations

import numpy as np
from policy_graphs import ScoreGraph, assert_nodes, image_feeds

from dllava_export.passes.policies.key_norm import KeyNormPolicy

KEY_NORM = KeyNormPolicy()


def test_nodes() -> None:
    assert_nodes(
        "key-norm",
        """
    key = Cast <to = 1> (kr0)
    key_heads = Reshape (key, split)
    length = ReduceL2 <keepdims = 0> (key_heads, last_axis)
    scores = ReduceMean <keepdims = 0> (length, last_axis)
""",
        ", int64[4] split = {0, 0, 1, 8}",
    )


def test_the_longest_keys_score_highest() -> None:
    feeds = image_feeds([[2, 2]])
    feeds["key"][:] = 0
    feeds["key"][0, 0, [0, 1]] = 3, 4  # head 0 has length 5, head 1 has 0
    feeds["key"][0, 1, [0, 8]] = 1, 2
    np.testing.assert_array_equal(ScoreGraph(KEY_NORM)(feeds), [[2.5, 1.5]])


def test_keeps_all_generated_tokens() -> None:
    assert not KEY_NORM.decides_text
