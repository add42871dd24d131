from __future__ import annotations

import collections

import helpers
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dllava_export.errors import PostconditionError
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.rotate_in_attention import RotateInAttentionPass

NUM_POSITIONS = 9
CACHE = "float[batch, 1, capacity_full, 16]"
INPUTS = (
    "int64[batch, rows] position_ids, float[batch, rows, 32] q, float[batch, rows, 16] k, "
    f"float[batch, rows, 16] v, {CACHE} past_key, {CACHE} past_value, int32[batch] seqlens, "
    "int32[1] total"
)
OUTPUTS = f"float[batch, rows, 32] y, {CACHE} present_key, {CACHE} present_value"
WEIGHTS = {"inv_freq": (10.0 ** -np.arange(8)).astype(np.float32)}
ATTENTION = (
    "com.microsoft.GroupQueryAttention <{}num_heads = 2, kv_num_heads = 1, scale = 0.25>"
)
ROTARY = "RotaryEmbedding <interleaved = 0, num_heads = {}>"
TABLES = """
    column{0} = Unsqueeze ({1}, axis_2)
    rows{0} = Cast <to = 1> (column{0})
    angles{0} = Mul (rows{0}, inv_freq)
    cos{0} = Cos (angles{0})
    sin{0} = Sin (angles{0})
"""
PARTS = {
    "tables": TABLES.format("", "position_ids"),
    "query": f"qr = {ROTARY.format(2)} (q, cos, sin)",
    "key": f"kr = {ROTARY.format(1)} (k, cos, sin)",
    "attention": f"y, present_key, present_value = {ATTENTION.format('')} "
    "(qr, kr, v, past_key, past_value, seqlens, total)",
}
CONSTANTS = "<int64[1] axis_2 = {2}, float half = {0.5}, int64 one = {1}>"
MOVED = f"""
    range = Range (first, num_positions, step)
    positions = Unsqueeze (range, axis_0)
    {TABLES.format("_all", "positions")}
    cos_table = Squeeze (cos_all, axis_0)
    sin_table = Squeeze (sin_all, axis_0)
    y, present_key, present_value = {ATTENTION.format("do_rotary = 1, ")}
        (q, k, v, past_key, past_value, seqlens, total, cos_table, sin_table)
"""
MOVED_CONSTANTS = """<int64[1] axis_0 = {0}, int64[1] axis_2 = {2}, int64 first = {0},
    int64 num_positions = {9}, int64 step = {1}>"""


def model(inputs: str = INPUTS, outputs: str = OUTPUTS, **parts: str) -> onnx.ModelProto:
    nodes = " ".join((PARTS | parts).values())
    return helpers.model_from_text(
        f"({inputs}) => ({outputs}) {CONSTANTS} {{ {nodes} }}", WEIGHTS
    )


def moved(before: onnx.ModelProto | None = None) -> onnx.ModelProto:
    return helpers.apply(before or model(), RotateInAttentionPass(NUM_POSITIONS))


def feeds(num_cached: list[int], num_fed: list[int]) -> dict[str, np.ndarray]:
    """Rows on top of what each sample has cached; shorter samples are padded."""
    rng = np.random.default_rng(0)
    batch, num_rows = len(num_fed), max(num_fed)
    ends = np.add(num_cached, num_fed)
    sizes = {"q": 32, "k": 16, "v": 16}
    values = {name: rng.normal(size=(batch, num_rows, size)) for name, size in sizes.items()}
    caches = ("past_key", "past_value")
    values |= {name: rng.normal(size=(batch, 1, NUM_POSITIONS, 16)) for name in caches}
    return {name: value.astype(np.float32) for name, value in values.items()} | {
        "position_ids": np.array(num_cached)[:, None] + np.arange(num_rows),
        "seqlens": (ends - 1).astype(np.int32),
        "total": np.array([ends.max()], np.int32),
    }


def test_attention_rotates_by_tables_of_all_positions() -> None:
    text = f"({INPUTS}) => ({OUTPUTS}) {MOVED_CONSTANTS} {{ {MOVED} }}"
    helpers.assert_same_graph(moved(), helpers.model_from_text(text, WEIGHTS))


@pytest.mark.parametrize(
    ("num_cached", "num_fed"),
    [
        pytest.param([0, 0], [5, 5], id="prompts"),
        pytest.param([0, 0], [2, 5], id="prompts of two lengths"),
        pytest.param([3, 8], [1, 1], id="one row"),
        pytest.param([4], [3], id="further prompt"),
    ],
)
def test_computes_the_same(num_cached: list[int], num_fed: list[int]) -> None:
    values = feeds(num_cached, num_fed)
    before, after = helpers.run(model(), values), helpers.run(moved(), values)
    for sample, (start, length) in enumerate(zip(num_cached, num_fed, strict=True)):
        helpers.assert_close(after["y"][sample, :length], before["y"][sample, :length])
        for name in ("present_key", "present_value"):
            valid = np.s_[sample, :, : start + length]
            helpers.assert_close(after[name][valid], before[name][valid])


def test_tables_are_computed_when_the_model_is_loaded(tmp_path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(moved().SerializeToString(), options)
    optimized = onnx.load(options.optimized_model_filepath)
    assert [node.op_type for node in optimized.graph.node] == ["GroupQueryAttention"]


def test_layers_share_the_tables() -> None:
    again = (
        f"qr2 = {ROTARY.format(2)} (y, cos, sin) kr2 = {ROTARY.format(1)} (k, cos, sin) "
        f"y2, pk2, pv2 = {ATTENTION.format('')} "
        "(qr2, kr2, v, past_key, past_value, seqlens, total)"
    )
    outputs = f"{OUTPUTS}, float[batch, rows, 32] y2, {CACHE} pk2, {CACHE} pv2"
    after = moved(model(outputs=outputs, again=again))
    counts = collections.Counter(node.op_type for node in after.graph.node)
    assert counts["GroupQueryAttention"] == 2
    assert counts["Range"] == counts["Cos"] == counts["Sin"] == 1


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(
            {"tables": "mixed = CumSum (position_ids, one)" + TABLES.format("", "mixed")},
            id="positions of other rows",
        ),
        pytest.param({"key": PARTS["key"].replace("cos, sin", "sin, cos")}, id="other tables"),
        pytest.param({"key": "kr = Relu (k)"}, id="no rotation"),
        pytest.param({"key": PARTS["key"].replace("ved = 0", "ved = 1")}, id="interleaved"),
        pytest.param(
            {
                "attention": PARTS["attention"].replace("(qr, kr", "(qr, kh")
                + " kh = Mul (kr, half)"
            },
            id="scaled afterwards",
        ),
    ],
)
def test_leaves_others_alone(parts: dict[str, str]) -> None:
    helpers.assert_changes_nothing(model(**parts), RotateInAttentionPass(NUM_POSITIONS))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("capacity_full", "capacity_sparse", id="sparse group"),
        pytest.param("float[", "float16[", id="float16"),
    ],
)
def test_leaves_other_caches_alone(old: str, new: str) -> None:
    other = model(INPUTS.replace(old, new), OUTPUTS.replace(old, new))
    helpers.assert_changes_nothing(other, RotateInAttentionPass(NUM_POSITIONS))


def test_leaves_heads_alone_that_the_kernel_does_not_rotate() -> None:
    narrow = [text.replace("32]", "48]").replace("16]", "24]") for text in (INPUTS, OUTPUTS)]
    helpers.assert_changes_nothing(model(*narrow), RotateInAttentionPass(NUM_POSITIONS))


def test_second_run_changes_nothing() -> None:
    helpers.assert_changes_nothing(moved(), RotateInAttentionPass(NUM_POSITIONS))


def test_reports_a_rotation_that_was_left() -> None:
    with pytest.raises(PostconditionError, match=r"The rotation before .* was left"):
        RotateInAttentionPass(NUM_POSITIONS).ensures(graph_from_model(model()))
