from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export import names
from dllava_export.errors import UnsupportedModelError
from dllava_export.passes.graph_io import graph_from_model, model_from_graph

VALUES = "(float[batch, rows, 8] x) => (float[batch, rows, 8] y)"


def parse(nodes: str, opset: int = 24, functions: str = "") -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "ai.dllava" : 1, "other" : 1]>'
    return onnx.parser.parse_model(f"{header} graph {VALUES} {{{nodes}}} {functions}")


def test_a_model_passes_through_unchanged() -> None:
    model = helpers.dense_decoder(2)
    again = model_from_graph(graph_from_model(model))
    assert again.SerializeToString() == model.SerializeToString()


def test_functions_are_attached_for_the_ops_in_use() -> None:
    model = helpers.model_from_text(
        "(float[batch, rows, 8] x, int64[batch, n] i) => (float[batch, n, 8] y)"
        "{y = ai.dllava.GatherTokens (x, i)}"
    )
    assert [f.name for f in model.functions] == ["GatherTokens"]
    assert {o.domain: o.version for o in model.opset_import} == {"": 24, names.DOMAIN: 1}


def test_functions_of_others_are_inlined() -> None:
    function = (
        """<domain: "other", opset_import: ["" : 24]> Twice (a) => (b) {b = Add (a, a)}"""
    )
    graph = graph_from_model(parse("y = other.Twice (x)", functions=function))
    assert [node.op for node in graph.nodes] == ["Add"]


def test_missing_shapes_are_inferred() -> None:
    graph = graph_from_model(parse("z = Relu (x) y = Neg (z)"))
    assert graph.tensors()["z"].shape == ["batch", "rows", 8]
    assert graph.tensors()["z"].dtype == np.float32


@pytest.mark.parametrize("opset", [17, 25])
def test_refuses_opsets_it_cannot_write(opset: int) -> None:
    message = f"The model has ONNX opset {opset}; this toolkit reads 18 to 24"
    with pytest.raises(UnsupportedModelError, match=message):
        graph_from_model(parse("y = Relu (x)", opset))


def test_refuses_ops_of_another_version() -> None:
    message = "of unknown op ai.dllava::Prune; known are SelectTokens, GatherTokens, "
    with pytest.raises(UnsupportedModelError, match=message):
        graph_from_model(parse("y = ai.dllava.Prune (x)"))


def test_older_opsets_are_written_as_ours() -> None:
    model = model_from_graph(graph_from_model(parse("y = Relu (x)", 18)))
    assert model.opset_import[0].version == names.OPSET
    assert model.ir_version == names.IR_VERSION


def test_external_weights_stay_external() -> None:
    model = parse("y = MatMul (x, w)")
    weight = model.graph.initializer.add(name="w", dims=[8, 8], data_type=1)
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="nowhere.safetensors")
    again = model_from_graph(graph_from_model(model))
    assert again.graph.initializer[0].SerializeToString() == weight.SerializeToString()
