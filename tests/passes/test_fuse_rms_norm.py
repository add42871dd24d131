from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.errors import PostconditionError
from dllava_export.passes.fuse_rms_norm import FuseRMSNormPass
from dllava_export.passes.graph_io import graph_from_model

WEIGHTS = helpers.random_weights(w=(6,))
CONSTANTS = "float two = {2}, float eps = {1e-3}, int64[1] last = {-1}, int64[1] rows = {1}"
FACTOR = """
    square = Pow (x, two)
    mean = ReduceMean <keepdims = 1> (square, last)
    shifted = Add (mean, eps)
    root = Sqrt (shifted)
    factor = Reciprocal (root)
"""
DECOMPOSED = FACTOR + "scaled = Mul (x, factor) y = Mul (w, scaled)"
FUSED = "y = RMSNormalization <axis = -1, epsilon = 1e-3, stash_type = 1> (x, w)"
FORMS = [
    pytest.param(DECOMPOSED, id="reciprocal of the root"),
    pytest.param(
        FACTOR.replace("Pow (x, two)", "Mul (x, x)")
        + "scaled = Mul (factor, x) y = Mul (scaled, w)",
        id="x times x",
    ),
    pytest.param(
        FACTOR.replace("Add (mean, eps)", "Add (eps, mean)")
        + "scaled = Div (x, root) y = Mul (scaled, w)",
        id="division by the root",
    ),
]
OTHERS = [
    pytest.param(FUSED, id="fused already"),
    pytest.param(DECOMPOSED.replace("last)", "rows)"), id="mean over rows"),
    pytest.param(DECOMPOSED.replace("two)", "eps)"), id="not squared"),
    pytest.param(
        DECOMPOSED.replace("scaled = Mul (x,", "scaled = Mul (square,"), id="not of x"
    ),
]


def norm(nodes: str, dtype: str = "float") -> onnx.ModelProto:
    value = f"{dtype}[batch, rows, 6]"
    text = f"({value} x) => ({value} y) <{CONSTANTS}> {{ {nodes} }}"
    weights = {
        k: v.astype(np.float16) if dtype == "float16" else v for k, v in WEIGHTS.items()
    }
    return helpers.model_from_text(text, weights)


def half_precision() -> onnx.ModelProto:
    nodes = DECOMPOSED.replace("(x,", "(x_f32,").replace("(w, scaled)", "(w, scaled_f16)")
    casts = "x_f32 = Cast <to = 1> (x)" + nodes
    return norm(casts.replace("y =", "scaled_f16 = Cast <to = 10> (scaled) y ="), "float16")


@pytest.mark.parametrize("nodes", FORMS)
def test_becomes_one_node(nodes: str) -> None:
    after = helpers.apply(norm(nodes), FuseRMSNormPass())
    helpers.assert_same_graph(after, norm(FUSED))


def test_takes_in_the_casts_around_half_precision() -> None:
    after = helpers.apply(half_precision(), FuseRMSNormPass())
    helpers.assert_same_graph(after, norm(FUSED, "float16"))


@pytest.mark.parametrize("nodes", OTHERS)
def test_leaves_other_graphs_alone(nodes: str) -> None:
    helpers.assert_changes_nothing(norm(nodes), FuseRMSNormPass())


def test_second_run_changes_nothing() -> None:
    after = helpers.apply(norm(DECOMPOSED), FuseRMSNormPass())
    helpers.assert_changes_nothing(after, FuseRMSNormPass())


def test_reports_a_norm_that_was_left() -> None:
    with pytest.raises(PostconditionError, match=r"^The RMSNorm at .* was left\.$"):
        FuseRMSNormPass().ensures(graph_from_model(norm(DECOMPOSED)))


@pytest.mark.parametrize("nodes", FORMS)
def test_computes_the_same(nodes: str) -> None:
    feeds = {"x": np.random.default_rng(5).normal(size=(2, 3, 6)).astype(np.float32)}
    before = norm(nodes)
    after = helpers.apply(before, FuseRMSNormPass())
    helpers.assert_close(helpers.run(after, feeds)["y"], helpers.run(before, feeds)["y"])


def test_computes_the_same_in_half_precision() -> None:
    feeds = {"x": np.random.default_rng(5).normal(size=(2, 3, 6)).astype(np.float16)}
    before = half_precision()
    after = helpers.apply(before, FuseRMSNormPass())
    helpers.assert_close(helpers.run(after, feeds)["y"], helpers.run(before, feeds)["y"])


def test_leaves_weight_data_where_it_is() -> None:
    model = norm(DECOMPOSED)
    weight = next(t for t in model.graph.initializer if t.name == "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="nowhere.safetensors")
    after = helpers.apply(model, FuseRMSNormPass())
    assert [t.SerializeToString() for t in after.graph.initializer] == [
        weight.SerializeToString()
    ]
