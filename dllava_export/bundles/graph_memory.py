"""What a graph holds in memory, read off its tensors' shapes: weights, activations, buffers.

Nothing is run and no weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dllava_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx


__all__ = ["buffer_bytes", "peak_activation_bytes", "weight_bytes"]


def weight_bytes(tensors: Iterable[onnx.TensorProto], *, itemsize: int | None = None) -> int:
    """Return the bytes of initializers, wherever their data lie.

    Args:
        tensors: The initializers.
        itemsize: Bytes of a value; each tensor's own where None.
    """
    return sum(
        math.prod(tensor.dims) * (itemsize or _itemsize(tensor.data_type))
        for tensor in tensors
    )


def buffer_bytes(values: Iterable[onnx.ValueInfoProto], dimensions: Mapping[str, int]) -> int:
    """Return the bytes of graph inputs or outputs.

    Args:
        values: The inputs or outputs.
        dimensions: Symbolic dimension → its size; a sum like `rows + 8` may stand in a shape.

    Raises:
        UnsupportedModelError: If a shape is not known.
    """
    sizes = _sizes(values, dimensions)
    return sum(sizes.values())


def peak_activation_bytes(model: onnx.ModelProto, dimensions: Mapping[str, int]) -> int:
    """Return the most that values between nodes take at one time.

    Each node writes new buffers, and a buffer is free behind its last reader: no two values
    share memory and nothing is fused, which runtimes do better. What a node needs inside is
    not counted, nor are graph inputs and outputs, nor values that weights alone give.

    Args:
        model: Its nodes in the order in which they run, with the shapes of all values.
        dimensions: As for `buffer_bytes`.

    Raises:
        UnsupportedModelError: If the shape of a value is not known.
    """
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer}
    last_read: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
        last_read.update(dict.fromkeys(node.input, index))
    sizes = _sizes(graph.value_info, dimensions)
    apart = {*constant, *(value.name for value in graph.output)}
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name and name not in apart:
                if name not in sizes:
                    raise UnsupportedModelError(
                        f"The shape of '{name}', which {node.op_type} '{node.name}' writes, is "
                        "not known; expected shapes of all values. Make the bundle again with "
                        "`dllava-export sparsify`."
                    )
                alive[name] = sizes[name]
        peak = max(peak, sum(alive.values()))
        for name in (*node.input, *node.output):
            if last_read.get(name, -1) <= index:
                alive.pop(name, None)
    return peak


def _sizes(
    values: Iterable[onnx.ValueInfoProto], dimensions: Mapping[str, int]
) -> dict[str, int]:
    """Return name → bytes of the values whose rank is known."""
    return {
        value.name: math.prod(_shape(value, dimensions))
        * _itemsize(value.type.tensor_type.elem_type)
        for value in values
        if value.type.tensor_type.HasField("shape")
    }


def _shape(value: onnx.ValueInfoProto, dimensions: Mapping[str, int]) -> list[int]:
    shape = []
    for dim in value.type.tensor_type.shape.dim:
        size = dim.dim_value if dim.HasField("dim_value") else _sum(dim.dim_param, dimensions)
        if size is None:
            raise UnsupportedModelError(
                f"'{value.name}' has a dimension '{dim.dim_param}', expected a number or one of "
                f"{', '.join(dimensions)}. Make the bundle again with `dllava-export sparsify`."
            )
        shape.append(size)
    return shape


def _sum(dimension: str, dimensions: Mapping[str, int]) -> int | None:
    """Return the size of a symbolic dimension or of a sum of such and numbers, else None."""
    total = 0
    for term in dimension.split(" + "):
        size = int(term) if term.isdecimal() else dimensions.get(term)
        if size is None:
            return None
        total += size
    return total


def _itemsize(data_type: int) -> int:
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(data_type).itemsize
