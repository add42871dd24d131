from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.errors import PostconditionError
from dllava_export.passes.fuse_residual_norm import FuseResidualNormPass
from dllava_export.passes.graph_io import graph_from_model

STREAM = "float[batch, rows, 8]"
NORM = "RMSNormalization <axis = -1, epsilon = 1e-5, stash_type = 1>"


def model(
    nodes: str = f"m = Add (x, b) y = {NORM} (m, w) z = Relu (m)", stream: str = STREAM
) -> onnx.ModelProto:
    dtype = stream.partition("[")[0]
    weights = helpers.random_weights(w=(8,))
    if dtype == "float16":
        weights["w"] = weights["w"].astype(np.float16)
    text = f"({stream} x, {stream} b) => ({stream} y, {stream} z) {{ {nodes} }}"
    return helpers.model_from_text(text, weights)


def fused() -> onnx.ModelProto:
    return helpers.apply(model(), FuseResidualNormPass())


def test_sum_and_norm_become_one_op() -> None:
    expected = model(
        "y, , , m = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (x, b, w) "
        "z = Relu (m)"
    )
    helpers.assert_same_graph(fused(), expected)


def test_computes_the_same() -> None:
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(2, 3, 8)).astype(np.float32) for name in "xb"}
    before, after = helpers.run(model(), feeds), helpers.run(fused(), feeds)
    for name in ("y", "z"):
        helpers.assert_close(after[name], before[name])


def test_epsilon_may_be_left_to_its_default() -> None:
    bare = model("m = Add (x, b) y = RMSNormalization (m, w) z = Relu (m)")
    after = helpers.apply(bare, FuseResidualNormPass())
    helpers.assert_same_graph(after, fused())


def test_two_norms_of_one_sum_share_it() -> None:
    twice = model(f"m = Add (x, b) y = {NORM} (m, w) z = {NORM} (m, w)")
    after = helpers.apply(twice, FuseResidualNormPass())
    ops = [node.op_type for node in after.graph.node]
    assert sorted(ops) == ["RMSNormalization", "SkipSimplifiedLayerNormalization"]
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(2, 3, 8)).astype(np.float32) for name in "xb"}
    helpers.assert_close(helpers.run(after, feeds)["z"], helpers.run(twice, feeds)["z"])


def test_every_sum_that_a_norm_reads_is_fused_in_a_decoder() -> None:
    after = helpers.apply(helpers.dense_decoder(2), FuseResidualNormPass())
    ops = [node.op_type for node in after.graph.node]
    # Of 5 norms only the first reads no sum: the embeddings enter there.
    assert ops.count("SkipSimplifiedLayerNormalization") == 4
    assert ops.count("RMSNormalization") == 1
    assert ops.count("Add") == 0


@pytest.mark.parametrize(
    ("nodes", "stream"),
    [
        pytest.param(f"z = Relu (b) y = {NORM} (x, w)", STREAM, id="no sum"),
        pytest.param(
            f"m = Add (x, w) y = {NORM} (m, w) z = Relu (b)", STREAM, id="broadcast sum"
        ),
        pytest.param(
            f"m = Add (x, b) y = {NORM} (m, w) z = Relu (m)", "float16[b, r, 8]", id="half"
        ),
        pytest.param(
            f"m = Add (x, b) y = {NORM} (m, w) z = Relu (m)", "float[rows, 8]", id="no batch"
        ),
        pytest.param(
            "m = Add (x, b) y = RMSNormalization <axis = 1, epsilon = 1e-5> (m, w) z = Relu (m)",
            STREAM,
            id="another axis",
        ),
    ],
)
def test_leaves_others_alone(nodes: str, stream: str) -> None:
    helpers.assert_changes_nothing(model(nodes, stream), FuseResidualNormPass())


def test_second_run_changes_nothing() -> None:
    helpers.assert_changes_nothing(fused(), FuseResidualNormPass())


def test_reports_a_sum_that_was_left() -> None:
    with pytest.raises(PostconditionError, match="was not fused"):
        FuseResidualNormPass().ensures(graph_from_model(model()))
