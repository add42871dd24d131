from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.insert_image_selection import InsertImageSelectionPass
from dllava_export.passes.insert_kv_cache import InsertKVCachePass
from dllava_export.passes.lower_for_tensorrt import LowerForTensorRTPass, has_attention_kernel

LOWER = LowerForTensorRTPass({"full": 9, "sparse": 7})
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def split_attention(attrs: str = "scale = 0.5", dtype: str = "float", head_dim: int = 4):
    q, k = (f"{dtype}[batch, {heads}, rows, {head_dim}]" for heads in (2, 2))
    return f"""({q} q, {k} k, {k} v) => ({q} y) {{
        y = Attention <{attrs}> (q, k, v)
    }}"""


def plain_attention(attrs: str = "is_causal = 1, ", num_kv_heads: int = 1) -> str:
    kv = f"float[batch, rows, {4 * num_kv_heads}]"
    return f"""(float[batch, rows, 8] q, {kv} k, {kv} v) => (float[batch, rows, 8] y) {{
        y = Attention <{attrs}q_num_heads = 2, kv_num_heads = {num_kv_heads}, scale = 0.5>
            (q, k, v)
    }}"""


def cached_attention(dtype: str = "float", head_dim: int = 4, num_kv_heads: int = 1) -> str:
    rows = f"{dtype}[batch, rows, {2 * head_dim}]"
    kv = f"{dtype}[batch, rows, {num_kv_heads * head_dim}]"
    cache = f"{dtype}[batch, {num_kv_heads}, capacity_full, {head_dim}]"
    return f"""({rows} q, {kv} k, {kv} v, {cache} pk, {cache} pv, int64[batch] write_index,
            int64[batch] row_lengths) => ({rows} y, {cache} nk, {cache} nv) {{
        y, nk, nv = ai.dllava.KVCacheAttention <num_heads = 2, kv_num_heads = {num_kv_heads},
            scale = 0.5, plugin_namespace = "dllava", plugin_version = "1">
            (q, k, v, pk, pv, write_index, row_lengths)
    }}"""


def lowered(text: str, step: LowerForTensorRTPass = LOWER) -> onnx.ModelProto:
    return helpers.apply(helpers.model_from_text(text), step)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def random_feeds(model: onnx.ModelProto, **sizes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    feeds = {}
    for value in model.graph.input:
        shape = [
            sizes.get(d.dim_param) or d.dim_value for d in value.type.tensor_type.shape.dim
        ]
        feeds[value.name] = rng.normal(size=shape).astype(np.float32)
    return feeds


# golden


def test_writes_attention_out():
    after = """(float[batch, 2, rows, 4] q, float[batch, 2, rows, 4] k,
            float[batch, 2, rows, 4] v) => (float[batch, 2, rows, 4] y)
        <float scale = {0.5}> {
        k_t = Transpose <perm = [0, 1, 3, 2]> (k)
        product = MatMul (q, k_t)
        scores = Mul (product, scale)
        weights = Softmax <axis = -1> (scores)
        y = MatMul (weights, v)
    }"""
    helpers.assert_same_graph(lowered(split_attention()), helpers.model_from_text(after))


def test_half_precision_computes_its_softmax_in_float32():
    model = lowered(split_attention(dtype="float16"))
    casts = [node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"]
    assert casts == [FLOAT, HALF]
    assert "Attention" not in ops(model)


def test_fixes_both_capacities():
    model = helpers.apply(
        helpers.dense_decoder(2),
        GatherLastRowPass(),
        InsertKVCachePass(),
        InsertImageSelectionPass("norm", 1),
        LOWER,
    )
    rows = {
        value.name: value.type.tensor_type.shape.dim[2].dim_value
        for value in (*model.graph.input, *model.graph.output)
        if value.name.endswith((".key", ".value"))
    }
    assert len(rows) == 8
    for layer, capacity in ((0, 9), (1, 7)):
        assert {rows[names.past(layer, part)] for part in ("key", "value")} == {capacity}
        assert {rows[names.present(layer, part)] for part in ("key", "value")} == {capacity}


def test_layers_of_one_group_share_their_mask():
    model = helpers.apply(helpers.dense_decoder(3), GatherLastRowPass(), InsertKVCachePass())
    written_out = ops(helpers.apply(model, LOWER))
    assert written_out.count("TensorScatter") == 6
    assert written_out.count("LessOrEqual") == 1


# noop


@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"),
    [
        (HALF, 16, True),
        (onnx.TensorProto.BFLOAT16, 128, True),
        (HALF, 256, True),
        (HALF, 8, False),
        (HALF, 264, False),
        (HALF, 20, False),
        (FLOAT, 64, False),
    ],
)
def test_knows_where_a_kernel_is(dtype, head_dim, expected):
    assert has_attention_kernel(dtype, head_dim) is expected


def test_leaves_attention_that_has_a_kernel():
    model = helpers.model_from_text(split_attention(dtype="float16", head_dim=16))
    helpers.assert_changes_nothing(model, LOWER)


def test_leaves_the_op_that_has_a_kernel_and_its_body():
    model = lowered(cached_attention("float16", 16))
    assert ops(model) == ["KVCacheAttention"]
    assert [body.name for body in model.functions] == ["KVCacheAttention"]


def test_leaves_ops_of_plugins():
    step = LowerForTensorRTPass(LOWER.capacities, plugin_ops=("KVCacheAttention",))
    assert ops(lowered(cached_attention(), step)) == ["KVCacheAttention"]


# idempotence


@pytest.mark.parametrize(
    "text",
    [split_attention(), plain_attention(), cached_attention()],
    ids=["4D", "3D", "cache"],
)
def test_second_run_changes_nothing(text):
    helpers.assert_changes_nothing(lowered(text), LOWER)


# contract


def test_refuses_attention_with_a_softcap():
    model = helpers.model_from_text(split_attention("scale = 0.5, softcap = 2.0"))
    with pytest.raises(PreconditionError, match=r"softcap 2\.0; expected query, key, value"):
        LOWER(graph_from_model(model))


def test_refuses_a_capacity_of_nothing():
    with pytest.raises(ValueError, match="capacity_sparse must be at least 1, got 0"):
        LowerForTensorRTPass({"full": 9, "sparse": 0})


def test_promises_no_attention_without_a_kernel():
    graph = graph_from_model(helpers.model_from_text(split_attention()))
    graph.nodes[0].name = "left"
    with pytest.raises(PostconditionError, match="'left' was not written out"):
        LOWER.ensures(graph)


def test_promises_no_symbolic_capacity():
    graph = graph_from_model(helpers.model_from_text(cached_attention()))
    with pytest.raises(PostconditionError, match="'pk' has a symbolic capacity"):
        LOWER.ensures(graph)


# parity


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(split_attention(), id="4D, no mask"),
        pytest.param(split_attention("is_causal = 1, scale = 0.5"), id="4D, causal"),
        pytest.param(split_attention("is_causal = 1"), id="default scale"),
        pytest.param(plain_attention(), id="shared key heads"),
        pytest.param(plain_attention(num_kv_heads=2), id="own key heads"),
    ],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_equals_the_attention_it_replaces(text, rows):
    model = helpers.model_from_text(text)
    feeds = random_feeds(model, batch=2, rows=rows)
    expected = helpers.run(model, feeds)["y"]
    helpers.assert_close(helpers.run(lowered(text), feeds)["y"], expected)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize(("rows", "write_index"), [(4, [0, 0]), (1, [6, 3]), (3, [5, 0])])
def test_equals_the_cached_attention_it_replaces(num_kv_heads, rows, write_index):
    text = cached_attention(num_kv_heads=num_kv_heads)
    model = helpers.model_from_text(text)
    feeds = random_feeds(model, batch=2, rows=rows, capacity_full=9)
    feeds["write_index"] = np.array(write_index, np.int64)
    feeds["row_lengths"] = np.full(2, rows, np.int64)
    expected, actual = helpers.run(model, feeds), helpers.run(lowered(text), feeds)
    helpers.assert_close(actual["y"], expected["y"])
    for cache in ("nk", "nv"):
        np.testing.assert_array_equal(actual[cache], expected[cache])
