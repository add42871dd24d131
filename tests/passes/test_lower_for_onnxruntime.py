from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export import names
from dllava_export.errors import PostconditionError
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.insert_image_selection import InsertImageSelectionPass
from dllava_export.passes.insert_kv_cache import InsertKVCachePass
from dllava_export.passes.lower_for_onnxruntime import LowerForOnnxRuntimePass

SEQUENCE_LENGTHS = """
    fed = Max (row_lengths, one)
    end = Add (write_index_full, fed)
    last_seen = Sub (end, one)
    seqlens_k = Cast <to = 6> (last_seen)
    longest = ReduceMax <keepdims = 1> (end, axis_0)
    total = Cast <to = 6> (longest)
"""
GROUP_QUERY_ATTENTION = """
    a{i}, "present.{i}.key", "present.{i}.value" = com.microsoft.GroupQueryAttention
        <num_heads = 2, kv_num_heads = 1, scale = 0.5>
        (qr{i}, kr{i}, v{i}, "past_key_values.{i}.key", "past_key_values.{i}.value",
         seqlens_k, total)
"""
FUSED_HEAD = """
    normed = RMSNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> (last, norm)
    row_logits = com.microsoft.FusedMatMul <transB = 1> (normed, lm_head)
"""
PRODUCTS = [
    pytest.param(
        "float", "w_t = Transpose <perm = [0, 1]> (w) y = MatMul (x, w_t)", id="no turn"
    ),
    pytest.param(
        "float16", "w_t = Transpose <perm = [1, 0]> (w) y = MatMul (x, w_t)", id="half"
    ),
    pytest.param("float", "y = MatMul (x, w)", id="stored as read"),
    pytest.param(
        "float",
        "r = Relu (w) r_t = Transpose <perm = [1, 0]> (r) y = MatMul (x, r_t)",
        id="not a weight",
    ),
]


def portable(sparse: bool = False) -> onnx.ModelProto:
    passes = [GatherLastRowPass(), InsertKVCachePass()]
    passes += [InsertImageSelectionPass("norm", 1)] if sparse else []
    return helpers.apply(helpers.dense_decoder(2), *passes)


def lowered(sparse: bool = False) -> onnx.ModelProto:
    return helpers.apply(portable(sparse), LowerForOnnxRuntimePass())


def expected() -> onnx.ModelProto:
    text = helpers.graph_text(
        f"{helpers.DENSE_INPUTS}, int64[batch, rows] token_kind, int64[batch] write_index_full, "
        + helpers.cache_values("past_key_values", 2),
        f"float[batch, 11] logits, {helpers.cache_values('present', 2)}, "
        "int64[batch] next_write_index_full",
        helpers.ROW_LENGTHS,
        SEQUENCE_LENGTHS,
        helpers.ROTARY.format(positions="position_ids"),
        helpers.layer_text(0, "inputs_embeds", GROUP_QUERY_ATTENTION),
        helpers.layer_text(1, "h0", GROUP_QUERY_ATTENTION),
        helpers.LAST_ROW.format(x="h1", lengths="row_lengths"),
        FUSED_HEAD,
        helpers.SQUEEZE,
        helpers.NEXT_WRITE_INDEX.format(group="full", stored="row_lengths", i=0),
    )
    return helpers.model_from_text(text, helpers.decoder_weights(2))


def feeds(kinds: list[list[int]], drop: int = 0) -> dict[str, np.ndarray]:
    return helpers.prompt(kinds, drop) | helpers.empty_caches(len(kinds), [12, 10])


def test_uses_the_ops_of_onnxruntime() -> None:
    helpers.assert_same_graph(lowered(), expected())


def test_keeps_float32_attention_for_cuda() -> None:
    model = helpers.apply(portable(), LowerForOnnxRuntimePass("cuda"))
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("KVCacheAttention") == 2
    assert "GroupQueryAttention" not in ops
    assert ops.count("FusedMatMul") == 1


def test_refuses_an_unknown_provider() -> None:
    with pytest.raises(ValueError, match=r"provider must be one of cpu, cuda, got 'tpu'\."):
        LowerForOnnxRuntimePass("tpu")


def test_fuses_half_precision_products_for_cuda() -> None:
    weights = {"w": np.ones((8, 8), np.float16)}
    model = helpers.model_from_text(
        "(float16[batch, 8] x) => (float16[batch, 8] y) "
        "{w_t = Transpose <perm = [1, 0]> (w) y = MatMul (x, w_t)}",
        weights,
    )
    after = helpers.apply(model, LowerForOnnxRuntimePass("cuda"))
    assert [node.op_type for node in after.graph.node] == ["FusedMatMul"]


@pytest.mark.parametrize(("dtype", "nodes"), PRODUCTS)
def test_leaves_other_products_alone(dtype: str, nodes: str) -> None:
    value = f"{dtype}[batch, 8]"
    weights = helpers.random_weights(w=(8, 8))
    if dtype == "float16":
        weights["w"] = weights["w"].astype(np.float16)
    model = helpers.model_from_text(f"({value} x) => ({value} y) {{{nodes}}}", weights)
    helpers.assert_changes_nothing(model, LowerForOnnxRuntimePass())


def test_leaves_heads_alone_that_the_kernel_refuses() -> None:
    cache, value = "float[b, 2, capacity, 4]", "float[b, rows, 8]"
    model = helpers.model_from_text(
        f"({value} x, {cache} k, {cache} v, int64[b] index, int64[b] lengths) => "
        f"({value} y, {cache} present_k, {cache} present_v) {{ y, present_k, present_v = "
        "ai.dllava.KVCacheAttention <num_heads = 2, kv_num_heads = 2, scale = 0.5> "
        "(x, x, x, k, v, index, lengths) }"
    )
    helpers.assert_changes_nothing(model, LowerForOnnxRuntimePass())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_second_run_changes_nothing(sparse: bool) -> None:
    helpers.assert_changes_nothing(lowered(sparse), LowerForOnnxRuntimePass())


def test_reports_attention_that_was_left() -> None:
    with pytest.raises(PostconditionError, match="was not lowered"):
        LowerForOnnxRuntimePass().ensures(graph_from_model(portable()))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([[1, 2, 2, 1, 1]], id="one sample"),
        pytest.param([[1]], id="one row"),
        pytest.param([[1, 2, 2, 1, 1], [2, 2, 1], [1, 1]], id="padded"),
    ],
)
def test_computes_the_same(kinds: list[list[int]], sparse: bool) -> None:
    before, after = helpers.Runner(portable(sparse)), helpers.Runner(lowered(sparse))
    first = feeds(kinds, drop=1)
    pair = before(first), after(first)
    for step in range(3):
        helpers.assert_close(pair[1][names.LOGITS], pair[0][names.LOGITS])
        row = helpers.generated_row(len(kinds), 5 + step, seed=step)
        pair = (
            before(row | helpers.carried_over(pair[0])),
            after(row | helpers.carried_over(pair[1])),
        )


def test_several_rows_on_a_filled_cache_compute_the_same_for_one_sample() -> None:
    before, after = helpers.Runner(portable()), helpers.Runner(lowered())
    first = feeds([[1, 2, 2]])
    more = helpers.prompt([[1, 1, 1, 1]], drop=0, seed=8)
    more[names.POSITION_IDS] = more[names.POSITION_IDS] + 3
    pair = [model(more | helpers.carried_over(model(first))) for model in (before, after)]
    helpers.assert_close(pair[1][names.LOGITS], pair[0][names.LOGITS])
    key = names.present(1, "key")
    helpers.assert_close(pair[1][key][:, :, :7], pair[0][key][:, :, :7])


@pytest.mark.parametrize(("sparse", "groups"), [(False, 1), (True, 2)])
def test_layers_of_a_cache_group_share_their_lengths(sparse: bool, groups: int) -> None:
    nodes = [n for n in lowered(sparse).graph.node if n.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2
    assert len({tuple(node.input[5:7]) for node in nodes}) == groups
