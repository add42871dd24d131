from __future__ import annotations

import numpy as np
from policy_graphs import ScoreGraph, assert_nodes, image_feeds

from dllava_export.geometry import Geometry
from dllava_export.passes.policies.fastv import FastVPolicy

FASTV = FastVPolicy()
SIZES = Geometry(3, 8, 12, 4, 2, 16, 11, num_image_tokens=10)


def test_nodes() -> None:
    assert_nodes(
        "fastv",
        """
    count = Shape <start = 1, end = 2> (token_kind)
    limit = Reshape (count, scalar_shape)
    row = Range (zero, limit, one)
    is_text = Equal (token_kind, one)
    is_image = Equal (token_kind, two)
    is_prompt = Or (is_text, is_image)
    prompt_row = Where (is_prompt, row, zero)
    reader = ReduceMax <keepdims = 1> (prompt_row, axis_1)
    reader_row = Max (reader, zero)
    reader_query = ai.dllava.GatherTokens (qr0, reader_row)
    query = Cast <to = 1> (reader_query)
    query_scaled = Mul (query, scale)
    query_heads = Reshape (query_scaled, query_split)
    query_t = Transpose <perm = [0, 2, 3, 1, 4]> (query_heads)
    key = Cast <to = 1> (kr0)
    key_heads = Reshape (key, key_split)
    key_t = Transpose <perm = [0, 2, 3, 1]> (key_heads)
    key_groups = Unsqueeze (key_t, axis_2)
    product = MatMul (query_t, key_groups)
    column = Unsqueeze (reader, last_axis)
    visible = LessOrEqual (row, column)
    mask = Unsqueeze (visible, axes_1_2)
    masked = Where (mask, product, lowest)
    weights = Softmax <axis = -1> (masked)
    paid = ReduceMean <keepdims = 0> (weights, axes_1_2)
    scores = Squeeze (paid, axis_1)
""",
        ", int64[0] scalar_shape = {}, float scale = {0.5}, int64[2] axes_1_2 = {1, 2}, "
        "int64[5] query_split = {0, 0, 1, 2, 8}, int64[4] key_split = {0, 0, 1, 8}, "
        "float lowest = {-3e38}",
    )


def test_the_last_prompt_row_alone_is_asked() -> None:
    feeds = image_feeds([[1, 2, 2, 1, 1, 3]])
    before = ScoreGraph(FASTV)(feeds)
    feeds["query"][0, [0, 1, 2, 3, 5]] = 9
    assert ScoreGraph(FASTV)(feeds)[0, 1:3].tolist() == before[0, 1:3].tolist()
    feeds["query"][0, 4] = 9
    assert (ScoreGraph(FASTV)(feeds)[0, 1:3] != before[0, 1:3]).all()


def test_the_key_it_asks_for_scores_highest() -> None:
    feeds = image_feeds([[1, 2, 2, 2, 1]])
    feeds["key"][0, 2] = feeds["query"][0, 4, [*range(8), *range(16, 24)]] * 5
    assert np.argmax(ScoreGraph(FASTV)(feeds)[0, 1:4]) == 1


def test_counts_its_product() -> None:
    assert FASTV.image_flops(SIZES) == 2 * 10 * 4 * 16
