from __future__ import annotations

import helpers
import numpy as np
import torch
from policy_graphs import HEADS, KV_HEADS, SCALE, empty_graph, image_arrays, image_feeds

from dllava_export import names
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.graph_io import model_from_graph
from dllava_export.passes.policies.base import AttentionRows
from dllava_export.passes.policies.paid_attention import (
    last_prompt_row,
    paid_attention,
    paid_attention_arrays,
    row_numbers,
)

KINDS = [[1, 2, 2, 1, 2, 1, 1], [2, 2, 1, 3], [3], [1, 1, 2]]


def last_rows(kinds: list[list[int]]) -> list[int]:
    graph, inputs = empty_graph("token_kind")
    builder = GraphBuilder(graph, "policy")
    kind = inputs["token_kind"]
    graph.outputs = [last_prompt_row(builder, kind, row_numbers(builder, kind))]
    (found,) = helpers.run(model_from_graph(graph), image_feeds(kinds)).values()
    return found[:, 0].tolist()


def paid_in_graph(kinds: list[list[int]], reader: list[list[int]]) -> list[np.ndarray]:
    """Return paid and visible, [batch, num_readers, rows]."""
    graph, inputs = empty_graph("query", "key", "token_kind")
    builder = GraphBuilder(graph, "policy")
    attention = AttentionRows(
        query=inputs["query"],
        key=inputs["key"],
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        scale=SCALE,
    )
    rows = builder.graph_input("reader", np.int64, [names.BATCH, len(reader[0])])
    row = row_numbers(builder, inputs["token_kind"])
    graph.outputs = list(paid_attention(builder, attention, row, rows))
    feeds = image_feeds(kinds) | {"reader": np.array(reader)}
    return list(helpers.run(model_from_graph(graph), feeds).values())


def test_the_last_prompt_row_is_text_or_image() -> None:
    assert last_rows(KINDS) == [6, 2, 0, 2]


def test_equals_the_attention_of_torch() -> None:
    kinds = [[1, 2, 2, 1, 2, 1, 1]]
    feeds = image_feeds(kinds)
    query, key = (
        torch.from_numpy(feeds[part]).double().view(1, 7, heads, -1).transpose(1, 2)
        for part, heads in (("query", HEADS), ("key", KV_HEADS))
    )
    weights = torch.nn.functional.scaled_dot_product_attention(
        query, key, torch.eye(7).double().expand(1, KV_HEADS, 7, 7),
        is_causal=True, scale=SCALE, enable_gqa=True,
    )  # fmt: skip
    expected = weights.mean(1)[0].numpy()
    paid, visible = paid_in_graph(kinds, [[6, 3, 0]])
    helpers.assert_close(paid[0], expected[[6, 3, 0]].astype(np.float32))
    assert visible[0].sum(-1).tolist() == [7, 4, 1]
    arrays = image_arrays(feeds, 0, np.array([1, 2, 4]), 3)
    found = paid_attention_arrays(arrays.attention, np.array([6, 3, 0]))
    np.testing.assert_allclose(found, expected[[6, 3, 0]], rtol=1e-9)


def test_a_reader_that_is_none_sees_nothing() -> None:
    paid, visible = paid_in_graph([[1, 2, 1]], [[2, -1]])
    assert visible[0].tolist() == [[True] * 3, [False] * 3]
    assert np.isfinite(paid).all()


def test_attention_of_a_row_sums_to_one() -> None:
    paid, _ = paid_in_graph(KINDS, [[6, 3], [3, 2], [0, 0], [2, 1]])
    np.testing.assert_allclose(paid.sum(-1), 1, rtol=1e-5)
