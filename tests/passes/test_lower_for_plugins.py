"""Ops in the form in which TensorRT's plugins take them."""

from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.passes.graph_io import graph_from_model, model_from_graph
from dllava_export.passes.lower_for_plugins import LowerForPluginsPass

LOWER = LowerForPluginsPass(("SelectTokens", "GatherTokens", "PredictorHead"))
HEAD = """
    (float[batch, rows] scores, int64[batch, rows] token_kind, int64[1] num_kept,
     int64[batch] kept_lengths)
"""
SELECT = (
    HEAD
    + """ => (int64[batch, num_kept] kept) <int64 zero = {0}, int64 one = {1},
    int64[1] axis_0 = {0}> {
    SLOTS
    kept = ai.dllava.SelectTokens (scores, token_kind, WIDTH, kept_lengths)
}"""
)
PREDICTOR = """
    (float[batch, rows, 4] x, float[4] v, float[4, 4] w) => (bool[batch, rows] kept) {
    scores, KEEP = ai.dllava.PredictorHead <epsilon = 1e-5> (x, v, v, w, v, w, v, w, v, w, v)
    MORE
    kept = Not (flag)
}"""


def select(slots: str, width: str) -> onnx.ModelProto:
    return helpers.model_from_text(SELECT.replace("SLOTS", slots).replace("WIDTH", width))


def predictor(keep: str, more: str) -> onnx.ModelProto:
    return helpers.model_from_text(PREDICTOR.replace("KEEP", keep).replace("MORE", more))


def outputs_of(model: onnx.ModelProto, op: str) -> list[str]:
    graph = graph_from_model(model)
    node = next(node for node in graph.nodes if node.op == op)
    return [str(tensor.dtype) for tensor in node.outputs]


SLOTS = """
    limit = Squeeze (num_kept, axis_0)
    range = Range (zero, limit, one)
    slots = Unsqueeze (range, axis_0)
"""


def with_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose predictor says what its outputs are, as passes write it."""
    graph = graph_from_model(model)
    for node in graph.nodes:
        if node.op == "PredictorHead":
            for tensor, dtype in zip(node.outputs, ("float32", "bool"), strict=True):
                tensor.dtype, tensor.shape = (
                    np.dtype(dtype),
                    ["batch", "rows"],
                )
    return model_from_graph(graph)


def test_selection_takes_its_width_from_a_shape() -> None:
    lowered = helpers.apply(select("", "num_kept"), LOWER)
    helpers.assert_same_graph(lowered, select(SLOTS, "slots"))


def test_predictor_gives_numbers() -> None:
    lowered = helpers.apply(with_types(predictor("flag", "")), LOWER)
    helpers.assert_same_graph(lowered, predictor("number", "flag = Cast <to = 9> (number)"))
    assert outputs_of(lowered, "PredictorHead") == ["float32", "int32"]


def test_selections_of_one_width_share_their_slots() -> None:
    text = SELECT.replace("SLOTS", "").replace("WIDTH", "num_kept")
    more = "other = ai.dllava.SelectTokens (scores, token_kind, num_kept, kept_lengths)\n}"
    text = text.replace("kept) <int64", "kept, int64[batch, num_kept] other) <int64")
    lowered = helpers.apply(helpers.model_from_text(text[: text.rindex("}")] + more), LOWER)
    assert sum(node.op_type == "Range" for node in lowered.graph.node) == 1


@pytest.mark.parametrize(
    "step", [LowerForPluginsPass(()), LowerForPluginsPass(("KVCacheAttention",))]
)
def test_leaves_ops_without_a_plugin_alone(step: LowerForPluginsPass) -> None:
    helpers.assert_changes_nothing(select("", "num_kept"), step)
    helpers.assert_changes_nothing(with_types(predictor("flag", "")), step)


def test_a_second_run_changes_nothing() -> None:
    for model in (select("", "num_kept"), with_types(predictor("flag", ""))):
        helpers.assert_changes_nothing(helpers.apply(model, LOWER), LOWER)


def test_a_computed_width_becomes_that_of_the_rows() -> None:
    computed = "doubled = Add (num_kept, axis_0)"
    lowered = helpers.apply(select(computed, "doubled"), LOWER)
    slots = SLOTS.replace("num_kept", "all_rows")
    shape = "all_rows = Shape <start = 1, end = 2> (token_kind)"
    helpers.assert_same_graph(lowered, select(f"{shape}{slots}", "slots"))


def test_a_wider_selection_begins_with_the_same_rows() -> None:
    rng = np.random.default_rng(3)
    feeds = {
        "scores": rng.normal(size=(2, 9)).astype(np.float32),
        "token_kind": rng.integers(0, 4, (2, 9)),
        "kept_lengths": np.array([5, 3]),
    }
    model = select("", "num_kept")
    narrow, wide = (
        helpers.run(model, feeds | {"num_kept": np.array([width])})["kept"] for width in (5, 9)
    )
    for b, length in enumerate(feeds["kept_lengths"]):
        assert wide[b, :length].tolist() == narrow[b, :length].tolist()
        assert (wide[b, length:] == 8).all()
