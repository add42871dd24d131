from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.errors import PostconditionError
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.pack_projections import PackProjectionsPass

CACHE = "float[batch, 1, capacity, 8]"
INPUTS = (
    "float[batch, rows, 8] x, float[batch, rows, 4] cos, float[batch, rows, 4] sin, "
    f"{CACHE} past_key, {CACHE} past_value, int32[batch] seqlens, int32[1] total"
)
OUTPUTS = f"float[batch, rows, 16] y, {CACHE} present_key, {CACHE} present_value"
WEIGHTS = helpers.random_weights(wq=(16, 8), wk=(8, 8), wv=(8, 8))
ATTENTION = "com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, scale = 0.5>"
ROTARY = "RotaryEmbedding <interleaved = 0, num_heads = {}>"
PARTS = {
    "query": "q = com.microsoft.FusedMatMul <transB = 1> (x, wq)",
    "key": "k = com.microsoft.FusedMatMul <transB = 1> (x, wk)",
    "value": "v = com.microsoft.FusedMatMul <transB = 1> (x, wv)",
    "query rotation": f"qr = {ROTARY.format(2)} (q, cos, sin)",
    "key rotation": f"kr = {ROTARY.format(1)} (k, cos, sin)",
    "attention": f"y, present_key, present_value = {ATTENTION} "
    "(qr, kr, v, past_key, past_value, seqlens, total)",
}
PACKED = f"""
    w = Concat <axis = 0> (wq, wk, wv)
    product = com.microsoft.FusedMatMul <transB = 1> (x, w)
    heads = Reshape (product, to_heads)
    cos_column = Unsqueeze (cos, axis_2)
    cos_filled = Where (is_rotated, cos_column, f_one)
    cos_table = Reshape (cos_filled, to_table)
    sin_column = Unsqueeze (sin, axis_2)
    sin_filled = Where (is_rotated, sin_column, f_zero)
    sin_table = Reshape (sin_filled, to_table)
    turned = RotaryEmbedding <num_heads = 1> (heads, cos_table, sin_table)
    packed = Reshape (turned, to_packed)
    y, present_key, present_value = {ATTENTION}
        (packed, , , past_key, past_value, seqlens, total)
"""
TABLES = "float[9, 4] cos_table, float[9, 4] sin_table"
ROTATES = ATTENTION.replace("<", "<do_rotary = 1, ")
ROTATING = {
    "query rotation": "",
    "key rotation": "",
    "attention": f"y, present_key, present_value = {ROTATES} "
    "(q, k, v, past_key, past_value, seqlens, total, cos_table, sin_table)",
}
ROTATING_PACKED = f"""
    w = Concat <axis = 0> (wq, wk, wv)
    packed = com.microsoft.FusedMatMul <transB = 1> (x, w)
    y, present_key, present_value = {ROTATES}
        (packed, , , past_key, past_value, seqlens, total, cos_table, sin_table)
"""
PACKED_CONSTANTS = """<int64[1] axis_2 = {2}, int64[3] to_heads = {0, -1, 8},
    int64[3] to_table = {0, -1, 4}, int64[3] to_packed = {0, -1, 32},
    bool[1, 1, 4, 1] is_rotated = {1, 1, 1, 0}, float f_one = {1.0}, float f_zero = {0.0}>"""


def model(outputs: str = OUTPUTS, *, inputs: str = INPUTS, **parts: str) -> onnx.ModelProto:
    """Return one attention; parts are replaced, `_` for a space in their names."""
    changed = {name.replace("_", " "): text for name, text in parts.items()}
    nodes = " ".join((PARTS | changed).values())
    return helpers.model_from_text(f"({inputs}) => ({outputs}) {{ {nodes} }}", WEIGHTS)


def rotating() -> onnx.ModelProto:
    return model(inputs=f"{INPUTS}, {TABLES}", **ROTATING)


def packed() -> onnx.ModelProto:
    return helpers.apply(model(), PackProjectionsPass())


def feeds(num_rows: int, num_cached: int) -> dict[str, np.ndarray]:
    """Two samples; the second one's rows stand at other positions."""
    rng = np.random.default_rng(0)
    positions = num_cached + np.arange(num_rows)[None] + np.array([[0], [5]])
    angles = positions[..., None] * np.array([1, 0.5, 0.25, 0.125])
    return {
        "x": rng.normal(size=(2, num_rows, 8)).astype(np.float32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "past_key": rng.normal(size=(2, 1, 9, 8)).astype(np.float32),
        "past_value": rng.normal(size=(2, 1, 9, 8)).astype(np.float32),
        "seqlens": np.full(2, num_cached + num_rows - 1, np.int32),
        "total": np.array([num_cached + num_rows], np.int32),
    }


def test_three_products_become_one() -> None:
    text = f"({INPUTS}) => ({OUTPUTS}) {PACKED_CONSTANTS} {{ {PACKED} }}"
    helpers.assert_same_graph(packed(), helpers.model_from_text(text, WEIGHTS))


def test_attention_that_rotates_needs_no_rotation_before_it() -> None:
    text = f"({INPUTS}, {TABLES}) => ({OUTPUTS}) {{ {ROTATING_PACKED} }}"
    after = helpers.apply(rotating(), PackProjectionsPass())
    helpers.assert_same_graph(after, helpers.model_from_text(text, WEIGHTS))
    helpers.assert_changes_nothing(after, PackProjectionsPass())


@pytest.mark.parametrize(("num_rows", "num_cached"), [(5, 0), (1, 6)])
def test_computes_the_same(num_rows: int, num_cached: int) -> None:
    values = feeds(num_rows, num_cached)
    before, after = helpers.run(model(), values), helpers.run(packed(), values)
    num_valid = num_cached + num_rows
    helpers.assert_close(after["y"], before["y"])
    for name in ("present_key", "present_value"):
        helpers.assert_close(after[name][:, :, :num_valid], before[name][:, :, :num_valid])


def test_layers_share_the_tables() -> None:
    nodes = " ".join(PARTS.values())
    again = (
        "x2 = Relu (y_half) q2 = com.microsoft.FusedMatMul <transB = 1> (x2, wq) "
        "k2 = com.microsoft.FusedMatMul <transB = 1> (x2, wk) "
        "v2 = com.microsoft.FusedMatMul <transB = 1> (x2, wv) "
        f"qr2 = {ROTARY.format(2)} (q2, cos, sin) kr2 = {ROTARY.format(1)} (k2, cos, sin) "
        f"y2, pk2, pv2 = {ATTENTION} (qr2, kr2, v2, past_key, past_value, seqlens, total)"
    )
    half = "y_half = Slice (y, zero, eight, two)"
    constants = "<int64[1] zero = {0}, int64[1] eight = {8}, int64[1] two = {2}>"
    outputs = f"{OUTPUTS}, float[batch, rows, 16] y2, {CACHE} pk2, {CACHE} pv2"
    text = f"({INPUTS}) => ({outputs}) {constants} {{ {nodes} {half} {again} }}"
    after = helpers.apply(helpers.model_from_text(text, WEIGHTS), PackProjectionsPass())
    ops = [node.op_type for node in after.graph.node]
    assert (ops.count("FusedMatMul"), ops.count("RotaryEmbedding"), ops.count("Where")) == (
        2,
        2,
        2,
    )


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(
            {"key": PARTS["key"].replace("(x,", "(z,") + " z = Relu (x)"}, id="input"
        ),
        pytest.param({"value": "v = MatMul (x, wv)"}, id="plain product"),
        pytest.param(
            {"value": PARTS["value"].replace("wv", "z") + " z = Relu (wv)"}, id="sum"
        ),
        pytest.param(
            {"key_rotation": f"kr = {ROTARY.format(1)} (k, sin, cos)"}, id="other tables"
        ),
        pytest.param({"key_rotation": "kr = Relu (k)"}, id="no rotation"),
        pytest.param(
            {"key_rotation": PARTS["key rotation"].replace("ved = 0", "ved = 1")},
            id="interleaved",
        ),
        pytest.param(
            {
                part.replace(" ", "_"): PARTS[part].replace("cos, sin", "c, s") + more
                for part, more in (
                    (
                        "query rotation",
                        " c = com.microsoft.Any (cos) s = com.microsoft.Any (sin)",
                    ),
                    ("key rotation", ""),
                )
            },
            id="tables of unknown shape",
        ),
    ],
)
def test_leaves_others_alone(parts: dict[str, str]) -> None:
    helpers.assert_changes_nothing(model(**parts), PackProjectionsPass())


def test_leaves_a_projection_alone_that_something_else_reads() -> None:
    outputs = OUTPUTS + ", float[batch, rows, 8] z"
    read_twice = model(outputs, value=PARTS["value"] + " z = Relu (v)")
    helpers.assert_changes_nothing(read_twice, PackProjectionsPass())


@pytest.mark.parametrize("rotated", ["query", "key"])
def test_leaves_a_rotation_alone_that_a_policy_reads(rotated: str) -> None:
    size = {"query": 16, "key": 8}[rotated]
    outputs = OUTPUTS + f", float[batch, rows, {size}] z"
    name = f"{rotated} rotation"
    more = f" z = Relu ({PARTS[name].split(' =')[0]})"
    read_twice = model(outputs, **{name: PARTS[name] + more})
    helpers.assert_changes_nothing(read_twice, PackProjectionsPass())


def test_second_run_changes_nothing() -> None:
    helpers.assert_changes_nothing(packed(), PackProjectionsPass())


def test_reports_attention_that_was_left() -> None:
    with pytest.raises(PostconditionError, match="were not packed"):
        PackProjectionsPass().ensures(graph_from_model(model()))
