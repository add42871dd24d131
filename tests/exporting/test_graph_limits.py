from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from dllava_export.errors import UnsupportedModelError
from dllava_export.exporting.graph_limits import (
    MAX_FOLDED_VALUES,
    MAX_NESTING,
    MAX_NODES,
    MAX_SHAPE_VALUES,
    check_number_of_nodes,
    check_sizes_of_shapes,
    may_fold,
)

PATH = Path("decoder.onnx")
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("bomb", 1)]


def model(nodes: list[onnx.NodeProto], **fields: list) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [], [], fields.get("initializer", []))
    return helper.make_model(
        graph, opset_imports=OPSETS, functions=fields.get("functions", [])
    )


def call(name: str, source: str = "x", target: str = "y") -> onnx.NodeProto:
    return helper.make_node(name, [source], [target], domain="bomb")


def function(name: str, *calls: str) -> onnx.FunctionProto:
    nodes = [call(c, f"x{i}", f"x{i + 1}") for i, c in enumerate(calls)]
    nodes = nodes or [helper.make_node("Identity", ["x0"], ["x1"])]
    return helper.make_function("bomb", name, ["x0"], [nodes[-1].output[0]], nodes, OPSETS)


def doubling(num: int) -> onnx.ModelProto:
    functions = [
        function("f0"),
        *(function(f"f{i}", *[f"f{i - 1}"] * 2) for i in range(1, num)),
    ]
    return model([call(f"f{num - 1}")], functions=functions)


def chain(num: int) -> onnx.ModelProto:
    functions = [function("f0"), *(function(f"f{i}", f"f{i - 1}") for i in range(1, num))]
    return model([call(f"f{num - 1}")], functions=functions)


def nested(num: int) -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"])
    for _ in range(num):
        branch = helper.make_graph([node], "b", [], [])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return model([node])


@pytest.mark.parametrize("graph", [doubling(12), chain(MAX_NESTING), nested(10)])
def test_accepts(graph: onnx.ModelProto) -> None:
    check_number_of_nodes(PATH, graph)


def test_functions_are_counted_where_they_are_used() -> None:
    with pytest.raises(UnsupportedModelError, match=r"has 24575 nodes .* at most 15000"):
        check_number_of_nodes(PATH, doubling(14))
    nodes = [helper.make_node("Neg", [f"{i}"], [f"{i + 1}"]) for i in range(MAX_NODES + 1)]
    check_number_of_nodes(PATH, model(nodes[1:]))
    with pytest.raises(UnsupportedModelError, match="has 15001 nodes"):
        check_number_of_nodes(PATH, model(nodes))


@pytest.mark.parametrize("graph", [chain(MAX_NESTING + 2), chain(5000), nested(13)])
def test_nesting_is_limited(graph: onnx.ModelProto) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"nests functions|nodes with its functions"
    ):
        check_number_of_nodes(PATH, graph)


def test_a_function_that_calls_itself() -> None:
    graph = model([call("f")], functions=[function("f", "g"), function("g", "f")])
    with pytest.raises(UnsupportedModelError, match="the function bomb::f calls itself"):
        check_number_of_nodes(PATH, graph)


def concats(num: int, first: onnx.NodeProto, **fields: list) -> ir.Model:
    nodes = [
        helper.make_node("Concat", [f"b{i}"] * 2, [f"b{i + 1}"], axis=0) for i in range(num)
    ]
    return ir.serde.deserialize_model(model([first, *nodes], **fields))


@pytest.mark.parametrize("kind", ["shape", "constant"])
def test_shapes_may_not_grow(kind: str) -> None:
    constant = onnx.numpy_helper.from_array(np.zeros(16, np.int64), "c")
    first = helper.make_node("Shape" if kind == "shape" else "Identity", ["c"], ["b0"])
    check_sizes_of_shapes(PATH, concats(12, first, initializer=[constant]))
    for num in (13, 200):
        with pytest.raises(
            UnsupportedModelError, match=f"over {MAX_SHAPE_VALUES} whole numbers"
        ):
            check_sizes_of_shapes(PATH, concats(num, first, initializer=[constant]))


def test_large_constants_are_not_computed() -> None:
    value = ir.Value(name="x", shape=ir.Shape([MAX_FOLDED_VALUES]))
    node = ir.node("Identity", [None], outputs=[value])
    assert may_fold(node) is None
    value.shape = ir.Shape([MAX_FOLDED_VALUES, 2])
    assert may_fold(node) is False
    value.shape = None
    assert may_fold(node) is None
