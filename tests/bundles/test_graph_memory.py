from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dllava_export.bundles.graph_memory import (
    buffer_bytes,
    peak_activation_bytes,
    weight_bytes,
)
from dllava_export.errors import UnsupportedModelError

DIMENSIONS = {"batch": 1, "rows": 10}
F16, F32 = TensorProto.FLOAT16, TensorProto.FLOAT


def value(name, shape, dtype=F16):
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes, values=(), outputs=("y",), weights=()):
    """Return a graph over x [rows, 4], float16; its output is [rows, 4] too."""
    graph = helper.make_graph(
        [helper.make_node(op, inputs, results) for op, inputs, results in nodes],
        "graph",
        [value("x", ["rows", 4])],
        [value(name, ["rows", 4]) for name in outputs],
        weights,
        value_info=values,
    )
    return helper.make_model(graph)


def weight(name, shape, dtype=np.float16):
    return numpy_helper.from_array(np.zeros(shape, dtype), name)


def test_weights_count_by_dtype():
    tensors = [weight("a", (3, 5)), weight("b", (7,), np.float32), weight("c", (), np.int64)]
    assert weight_bytes(tensors) == 30 + 28 + 8
    assert weight_bytes(tensors, itemsize=4) == 60 + 28 + 4


def test_weights_count_without_their_data():
    tensor = TensorProto(name="a", data_type=F32, dims=(1000, 1000))
    tensor.data_location = TensorProto.EXTERNAL
    assert weight_bytes([tensor]) == 4_000_000


def test_buffers_count_symbolic_dimensions():
    values = [value("a", ["batch", "rows", 4]), value("b", ["batch"], TensorProto.INT64)]
    assert buffer_bytes(values, {"batch": 3, "rows": 10}) == 3 * 10 * 4 * 2 + 3 * 8


def test_a_value_is_free_behind_its_last_reader():
    chain = [("Relu", ["x"], ["a"]), ("Relu", ["a"], ["b"]), ("Relu", ["b"], ["c"]),
             ("Relu", ["c"], ["y"])]  # fmt: skip
    values = [value(name, ["rows", 4]) for name in "abc"]
    assert peak_activation_bytes(model(chain, values), DIMENSIONS) == 2 * 80


def test_a_value_lives_as_long_as_it_is_read():
    nodes = [("Relu", ["x"], ["residual"]), ("Relu", ["residual"], ["a"]),
             ("Relu", ["a"], ["b"]), ("Add", ["b", "residual"], ["y"])]  # fmt: skip
    values = [value("residual", ["rows", 4]), value("a", ["rows", 8]), value("b", ["rows", 8])]
    assert peak_activation_bytes(model(nodes, values), DIMENSIONS) == 80 + 2 * 160


def test_a_value_that_nobody_reads_counts_while_it_is_written():
    nodes = [("Relu", ["x"], ["unread"]), ("Relu", ["x"], ["a"]), ("Relu", ["a"], ["y"])]
    values = [value("unread", ["rows", 100]), value("a", ["rows", 4])]
    assert peak_activation_bytes(model(nodes, values), DIMENSIONS) == 2000


def test_what_weights_alone_give_is_no_activation():
    nodes = [
        ("Transpose", ["w"], ["t"]),
        ("MatMul", ["x", "t"], ["a"]),
        ("Relu", ["a"], ["y"]),
    ]
    values = [value("t", [4, 1000]), value("a", ["rows", 1000])]
    found = peak_activation_bytes(
        model(nodes, values, weights=[weight("w", (1000, 4))]), DIMENSIONS
    )
    assert found == 10 * 1000 * 2


def test_outputs_are_no_activations():
    nodes = [("Relu", ["x"], ["y"]), ("Relu", ["y"], ["z"])]
    assert peak_activation_bytes(model(nodes, outputs=("y", "z")), DIMENSIONS) == 0


def test_rows_that_are_not_there_take_nothing():
    nodes = [("Relu", ["x"], ["a"]), ("Relu", ["a"], ["y"])]
    graph = model(nodes, [value("a", ["num_image_rows", 4])])
    assert peak_activation_bytes(graph, {**DIMENSIONS, "num_image_rows": 0}) == 0


@pytest.mark.parametrize(
    ("dimension", "rows"), [("rows + 8", 18), ("rows + batch + 2", 13), ("3 + rows", 13)]
)
def test_a_dimension_may_be_a_sum(dimension, rows):
    graph = model(
        [("Relu", ["x"], ["a"]), ("Relu", ["a"], ["y"])], [value("a", [dimension, 4])]
    )
    assert peak_activation_bytes(graph, DIMENSIONS) == rows * 4 * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param([], "shape of 'a', which Relu '' writes, is not known", id="no value info"),
        pytest.param([onnx.ValueInfoProto(name="a")], "shape of 'a'", id="no shape"),
        pytest.param([value("a", ["n", 4])], r"'a' has a dimension 'n', expected a number or "
                     r"one of batch, rows\. Make the bundle again", id="unknown name"),
        pytest.param([value("a", ["rows + n", 4])], r"'a' has a dimension 'rows \+ n', expected",
                     id="unknown name in a sum"),
        pytest.param([value("a", [None, 4])], "'a' has a dimension ''", id="no name"),
    ],
)  # fmt: skip
def test_refuses_unknown_shapes(values, message):
    graph = model([("Relu", ["x"], ["a"]), ("Relu", ["a"], ["y"])], values)
    with pytest.raises(UnsupportedModelError, match=message):
        peak_activation_bytes(graph, DIMENSIONS)
