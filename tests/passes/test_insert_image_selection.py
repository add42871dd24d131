from __future__ import annotations

import dataclasses
import re

import helpers
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import tolerances
import torch
from policy_graphs import official_image_logits

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.insert_image_selection import (
    InsertImageSelectionPass,
    find_image_selection,
)
from dllava_export.passes.insert_kv_cache import InsertKVCachePass
from dllava_export.passes.policies.base import AttentionArrays, ImageArrays
from dllava_export.passes.policies.registry import POLICIES

LINEAR = """
    {y}_t = Transpose <perm = [1, 0]> ("image_predictor.{name}.weight")
    {y}_product = MatMul ({x}, {y}_t)
    {y} = Add ({y}_product, "image_predictor.{name}.bias")
"""
EVENLY_SPACED = """
    is_image = Equal (token_kind, two)
    counted_image = Cast <to = 7> (is_image)
    num_image = ReduceSum <keepdims = 1> (counted_image, axis_1)
    rank = CumSum <exclusive = 1, reverse = 0> (counted_image, one)
    following = Add (rank, one)
    dropped = Sub (row_lengths, kept_lengths)
    dropped_column = Unsqueeze (dropped, axis_1)
    num_kept_image = Sub (num_image, dropped_column)
    divisor = Max (num_image, one)
    up_to_product = Mul (following, num_kept_image)
    up_to = Div (up_to_product, divisor)
    before_product = Mul (rank, num_kept_image)
    before = Div (before_product, divisor)
    difference = Sub (up_to, before)
    scores = Cast <to = 1> (difference)
"""
HASH = """
    salted = Add (position_ids, one)
    multiplied = Mul (salted, factor)
    shifted = Add (multiplied, shift)
    reduced = Mod (shifted, prime)
    quadratic = Mul (reduced, salted)
    mixed = Add (quadratic, offset)
    hashed = Mod (mixed, prime)
    number = Cast <to = 1> (hashed)
    scores = Div (number, prime_float)
"""
PREDICTOR = (
    """
    dims = Shape (token_kind)
    no_scores = ConstantOfShape <value = float[1] {0}> (dims)
    is_image = Equal (token_kind, two)
    num_rows = Shape <start = 1, end = 2> (token_kind)
    limit = Reshape (num_rows, scalar_shape)
    row = Range (zero, limit, one)
    row_behind = Add (row, num_rows)
    order = Where (is_image, row, row_behind)
    image_order, image_rows = TopK <axis = 1, largest = 0, sorted = 1> (order, num_image_rows)
    image_hidden = ai.dllava.GatherTokens (h0, image_rows)
    hidden = Cast <to = 1> (image_hidden)
    hidden_normed = LayerNormalization <axis = -1, epsilon = 1e-5>
        (hidden, "image_predictor.down_mlp.0.weight", "image_predictor.down_mlp.0.bias")
"""
    + LINEAR.format(name="down_mlp.1", x="hidden_normed", y="down")
    + """
    z = Gelu (down)
    local, other = Split <axis = -1, num_outputs = 2> (z)
    mean = ReduceMean <keepdims = 1> (other, axis_1)
    local_dims = Shape (local)
    global = Expand (mean, local_dims)
    joined = Concat <axis = -1> (local, global)
"""
    + LINEAR.format(name="output_mlp.0", x="joined", y="out_0")
    + "out_0_gelu = Gelu (out_0)"
    + LINEAR.format(name="output_mlp.2", x="out_0_gelu", y="out_2")
    + "out_2_gelu = Gelu (out_2)"
    + LINEAR.format(name="output_mlp.4", x="out_2_gelu", y="out_4")
    + """
    log_probs = LogSoftmax <axis = -1> (out_4)
    log_prob_keep = Gather <axis = -1> (log_probs, zero)
    scores = ScatterElements <axis = 1> (no_scores, image_rows, log_prob_keep)
"""
)
# Nodes of the others stand with their own tests.
SCORES = {
    "predictor": PREDICTOR,
    "random": HASH,
    "uniform": EVENLY_SPACED,
    "norm": helpers.NORM_SCORES,
}
BUILT_IN = [name for name in POLICIES.names() if POLICIES.find_built_in(name)]
MORE_CONSTANTS = """, int64 factor = {48271}, int64 shift = {1103515245}, int64 offset = {12345},
    int64 prime = {2147483647}, float prime_float = {2147483647.0}, int64[0] scalar_shape = {}"""


def dense(num_layers: int = 2, cache: bool = False) -> onnx.ModelProto:
    passes = [GatherLastRowPass(), *([InsertKVCachePass()] if cache else [])]
    return helpers.apply(helpers.dense_decoder(num_layers), *passes)


def selection(policy: str, sparse_layer: int = 1, blocks: int = 1) -> InsertImageSelectionPass:
    weights = helpers.predictor_weights(blocks=blocks) if policy == "predictor" else None
    return InsertImageSelectionPass(policy, sparse_layer, weights)


def expected(policy: str, cache: bool) -> onnx.ModelProto:
    text = helpers.SparseText(
        cache,
        SCORES[policy],
        inputs=", int64[1] num_image_rows" if policy == "predictor" else "",
        constants=MORE_CONSTANTS,
    )
    return text.model(helpers.predictor_weights(blocks=0).tensors)


def image_scores(
    policy: str,
    decoder: helpers.ReferenceDecoder,
    hidden: np.ndarray,
    positions: np.ndarray,
    kinds: np.ndarray,
    kept: int,
) -> np.ndarray:
    """Return what a policy gives image rows, by NumPy or torch.

    Args:
        policy: Its name.
        decoder: Which ran the layer before.
        hidden: [rows, 8].
        positions: [rows].
        kinds: [rows].
        kept: Image rows that stay.
    """
    image = np.flatnonzero(kinds == names.IMAGE)
    hidden, positions = hidden[image].astype(np.float32), positions[image]
    if policy == "predictor":
        weights = helpers.predictor_weights()
        return official_image_logits(torch.from_numpy(hidden), weights)[:, 0].numpy()
    if policy == "random":
        return helpers.hashed(positions)
    query, key = decoder.attended
    attention = AttentionArrays(query=query, key=key, scale=0.5, token_kind=kinds)
    rows = ImageArrays(
        hidden_states=hidden, position_ids=positions, num_kept=kept, attention=attention
    )
    return POLICIES.get(policy).reference(rows, None)


def reference_run(
    policy: str,
    feeds: dict[str, np.ndarray],
    sample: int,
    sparse_layer: int,
    drop: int,
    renumber: bool = False,
) -> tuple[list[int], np.ndarray]:
    """Return kept rows and logits of one sample.

    Args:
        policy: Its name.
        feeds: From `helpers.prompt`.
        sample: Which one.
        sparse_layer: Where rows go.
        drop: How many image rows go.
        renumber: Give the rows that stay the positions 0, 1, 2, ..., which is wrong.
    """
    kinds = feeds[names.TOKEN_KIND][sample]
    kinds = kinds[kinds != names.PADDING]
    is_image = kinds == names.IMAGE
    decoder = helpers.ReferenceDecoder(3, renumbers=renumber)
    chosen = list(range(len(kinds)))

    def select(hidden: np.ndarray, positions: np.ndarray) -> list[int]:
        if is_image.any():
            kept = is_image.sum() - drop
            scores = image_scores(policy, decoder, hidden, positions, kinds, kept)
            best = np.flatnonzero(is_image)[np.argsort(-scores, kind="stable")[:kept]]
            chosen[:] = sorted({*best.tolist(), *np.flatnonzero(~is_image).tolist()})
        return chosen

    rows = feeds[names.INPUTS_EMBEDS][sample, : len(kinds)]
    positions = feeds[names.POSITION_IDS][sample, : len(kinds)]
    logits = decoder.feed(rows, positions, sparse_layer, select)
    return chosen, logits.astype(np.float32)


@pytest.mark.parametrize("cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("policy", SCORES)
def test_selects_rows_before_the_sparse_layer(policy: str, cache: bool) -> None:
    after = helpers.apply(dense(cache=cache), selection(policy, blocks=0))
    helpers.assert_same_graph(after, expected(policy, cache))


@pytest.mark.parametrize("policy", BUILT_IN)
def test_leaves_a_sparse_graph_alone(policy: str) -> None:
    model = helpers.apply(dense(cache=True), selection(policy))
    helpers.assert_changes_nothing(model, selection(policy))


def test_second_run_changes_nothing() -> None:
    graph = graph_from_model(dense())
    assert selection("norm")(graph) is True
    assert selection("norm")(graph) is False


@pytest.mark.parametrize("policy", ["none", "nowhere"])
def test_refuses_unknown_policies(policy: str) -> None:
    message = f"policy must be one of {', '.join(BUILT_IN)}, got '{policy}'. "
    with pytest.raises(ValueError, match=re.escape(message)):
        InsertImageSelectionPass(policy, 1)


@pytest.mark.parametrize("sparse_layer", [0, 2, 7])
def test_refuses_layers_that_are_not_there(sparse_layer: int) -> None:
    message = (
        rf"sparse_layer must be in 1\.\.1 for this decoder of 2 layers, got {sparse_layer}"
    )
    with pytest.raises(PreconditionError, match=message):
        helpers.apply(dense(), selection("norm", sparse_layer))


def test_refuses_a_graph_without_row_kinds() -> None:
    with pytest.raises(
        PreconditionError, match=r"^The graph has no input 'token_kind'; found"
    ):
        helpers.apply(helpers.dense_decoder(2), selection("norm"))


@pytest.mark.parametrize("other", [("random", 1), ("norm", 2)])
def test_refuses_a_decoder_that_is_sparse_otherwise(other: tuple[str, int]) -> None:
    model = helpers.apply(dense(3), selection("norm", 1))
    message = r"^The decoder is already sparse \(layers.1/select_image/norm\), and layers."
    with pytest.raises(PreconditionError, match=message):
        helpers.apply(model, selection(*other))


def test_refuses_a_predictor_without_weights() -> None:
    with pytest.raises(PreconditionError, match="The checkpoint has no image_predictor"):
        helpers.apply(dense(), InsertImageSelectionPass("predictor", 1))


def test_refuses_what_it_cannot_gather() -> None:
    nodes = (
        helpers.dense_text()
        .replace("cos =", "mean = ReduceMean <keepdims = 1> (angle, axes) cos =")
        .replace("h1 = Add (m1, d1)", "scaled = Mul (d1, mean) h1 = Add (m1, scaled)")
    )
    text = helpers.graph_text(helpers.DENSE_INPUTS, "float[batch, rows, 11] logits", nodes)
    text = text.replace(helpers.CONSTANTS, f"{helpers.CONSTANTS}, int64[2] axes = {{1, 2}}")
    model = helpers.model_from_text(text, helpers.decoder_weights(2))
    message = "^'mean' of shape .* is read after the selection at 'h0', and is not known"
    with pytest.raises(PreconditionError, match=message):
        helpers.apply(model, GatherLastRowPass(), selection("norm"))


def test_reports_a_layer_that_reads_all_rows() -> None:
    with pytest.raises(
        PostconditionError, match=r"^Decoder layer 1 does not read kept rows\.$"
    ):
        selection("norm").ensures(graph_from_model(dense()))


def test_reports_a_cache_at_the_full_index() -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken(InsertImageSelectionPass):
        def apply(self, graph: gs.Graph) -> bool:
            super().apply(graph)
            for node in graph.nodes:
                if node.op == "KVCacheAttention":
                    node.inputs[5] = graph.tensors()[names.write_index(names.FULL)]
            return True

    with pytest.raises(
        PostconditionError, match=r"^Decoder layer 1 still writes its cache at"
    ):
        Broken("norm", 1)(graph_from_model(dense(cache=True)))


@pytest.mark.parametrize("policy", BUILT_IN)
def test_keeping_every_row_equals_the_dense_graph(policy: str) -> None:
    feeds = helpers.prompt([[1, 2, 2, 2, 1, 1], [2, 2, 2, 1]], drop=0)
    expected = helpers.run(dense(), feeds)
    actual = helpers.run(helpers.apply(dense(), selection(policy)), feeds)
    helpers.assert_close(actual[names.LOGITS], expected[names.LOGITS])
    assert actual[names.KEPT_INDICES].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 5]]


@pytest.mark.parametrize("policy", BUILT_IN)
@pytest.mark.parametrize("sparse_layer", [1, 2])
def test_equals_the_reference_with_fewer_rows(policy: str, sparse_layer: int) -> None:
    kinds, drop = [[1, 2, 2, 2, 1, 2, 2, 1, 1], [1, 1, 2, 2, 2, 2, 2], [1, 1, 1]], 3
    feeds = helpers.prompt(kinds, drop)
    outputs = helpers.run(helpers.apply(dense(3), selection(policy, sparse_layer)), feeds)
    for sample in range(len(kinds)):
        chosen, logits = reference_run(policy, feeds, sample, sparse_layer, drop)
        kept = outputs[names.KEPT_INDICES][sample]
        assert kept[: len(chosen)].tolist() == chosen
        assert (kept[len(chosen) :] == feeds[names.TOKEN_KIND].shape[1] - 1).all()
        helpers.assert_close(outputs[names.LOGITS][sample], logits)


@pytest.mark.parametrize("policy", BUILT_IN)
@pytest.mark.parametrize("drop", [0, 1, 8, 12])
def test_kept_rows_ascend_and_hold_all_text(policy: str, drop: int) -> None:
    kinds = [1, 1, *[2] * 13, 1, 3]
    feeds = helpers.prompt([kinds], drop)
    kept = helpers.run(helpers.apply(dense(), selection(policy)), feeds)[names.KEPT_INDICES][0]
    assert len(kept) == len(kinds) - drop
    assert (np.diff(kept) > 0).all()
    assert {0, 1, 15, 16} <= set(kept.tolist())


def test_lower_index_wins_ties() -> None:
    feeds = helpers.prompt([[1, 2, 2, 2, 2, 1]], drop=2)
    feeds[names.POSITION_IDS][:] = 0  # what `random` draws its numbers from
    kept = helpers.run(helpers.apply(dense(), selection("random")), feeds)
    assert kept[names.KEPT_INDICES].tolist() == [[0, 1, 2, 5]]


@pytest.mark.parametrize("policy", BUILT_IN)
def test_positions_are_not_renumbered(policy: str) -> None:
    feeds = helpers.prompt([[1, 2, 2, 2, 2, 2, 2, 1, 1]], drop=4)
    model = helpers.apply(dense(3), selection(policy))
    logits = helpers.run(model, feeds)[names.LOGITS][0]
    rows, expected = reference_run(policy, feeds, 0, 1, drop=4)
    assert rows != list(range(5))  # else renumbering would change nothing
    helpers.assert_close(logits, expected)
    _, renumbered = reference_run(policy, feeds, 0, 1, drop=4, renumber=True)
    assert np.abs(logits - renumbered).max() > 100 * tolerances.TORCH


def test_finds_what_it_inserted() -> None:
    graph = graph_from_model(helpers.apply(dense(3), selection("random", 2)))
    found = find_image_selection(graph)
    assert found is not None
    assert (found.scope, found.layer) == ("layers.2/select_image/random", 2)
    assert found.kept_indices.name == names.KEPT_INDICES
    assert find_image_selection(graph_from_model(dense())) is None
