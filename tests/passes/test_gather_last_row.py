from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model

INPUTS = f"{helpers.DENSE_INPUTS}, int64[batch, rows] token_kind"


def dense() -> onnx.ModelProto:
    return helpers.dense_decoder(2)


def last_row_only() -> onnx.ModelProto:
    text = helpers.graph_text(
        INPUTS,
        "float[batch, 11] logits",
        helpers.ROTARY.format(positions="position_ids"),
        helpers.layer_text(0, "inputs_embeds"),
        helpers.layer_text(1, "h0"),
        helpers.ROW_LENGTHS,
        helpers.LAST_ROW.format(x="h1", lengths="row_lengths"),
        helpers.HEAD.format(x="last", logits="row_logits"),
        helpers.SQUEEZE,
    )
    return helpers.model_from_text(text, helpers.decoder_weights(2))


def with_second_output() -> onnx.ModelProto:
    model = dense()
    hidden = next(v for v in model.graph.value_info if v.name == "h1")
    model.graph.output.append(hidden)
    model.graph.value_info.remove(hidden)
    return model


def test_gathers_before_the_final_norm() -> None:
    helpers.assert_same_graph(helpers.apply(dense(), GatherLastRowPass()), last_row_only())


def test_leaves_a_graph_with_row_kinds_alone() -> None:
    helpers.assert_changes_nothing(last_row_only(), GatherLastRowPass())


def test_second_run_changes_nothing() -> None:
    after = helpers.apply(dense(), GatherLastRowPass())
    helpers.assert_changes_nothing(after, GatherLastRowPass())


def test_refuses_a_graph_without_layers() -> None:
    model = helpers.model_from_text("(float[b, r, 8] x) => (float[b, r, 8] y) {y = Relu (x)}")
    with pytest.raises(
        PreconditionError, match=r"^The graph has no causal attention over rows"
    ):
        helpers.apply(model, GatherLastRowPass())


def test_refuses_further_outputs() -> None:
    with pytest.raises(
        PreconditionError, match=r"^2 graph outputs depend on the last decoder"
    ):
        helpers.apply(with_second_output(), GatherLastRowPass())


def test_reports_logits_of_all_rows() -> None:
    with pytest.raises(PostconditionError, match=r"^The first output is 'logits' of shape"):
        GatherLastRowPass().ensures(graph_from_model(dense()))


def test_logits_are_those_of_each_last_valid_row() -> None:
    feeds = helpers.prompt([[1, 2, 1, 1, 1], [1, 1], [1]], drop=0)
    expected = helpers.run(dense(), feeds)[names.LOGITS]
    actual = helpers.run(helpers.apply(dense(), GatherLastRowPass()), feeds)[names.LOGITS]
    helpers.assert_close(actual, expected[[0, 1, 2], [4, 1, 0]])


def test_a_sample_of_padding_alone_is_no_error() -> None:
    feeds = helpers.prompt([[1, 1], [0, 0]], drop=0)
    logits = helpers.run(helpers.apply(dense(), GatherLastRowPass()), feeds)[names.LOGITS]
    assert np.isfinite(logits).all()


def test_what_follows_is_declared_to_have_one_row() -> None:
    after = helpers.apply(dense(), GatherLastRowPass())
    shapes = {v.name: v.type.tensor_type.shape for v in after.graph.value_info}
    assert shapes["normed"].dim[1].dim_value == 1
