"""Limits of graphs that others made: what is beyond them takes hours or all memory to read.

The largest decoders that the passes know have some 80 layers of 150 nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "MAX_FOLDED_VALUES",
    "MAX_NESTING",
    "MAX_NODES",
    "MAX_SHAPE_VALUES",
    "check_number_of_nodes",
    "check_sizes_of_shapes",
    "may_fold",
]

MAX_NODES = 15_000
MAX_NESTING = 16
MAX_SHAPE_VALUES = 1 << 16
MAX_FOLDED_VALUES = 1 << 22

_MAX_RANK = 16
_JOINED = ("Concat", "SequenceConstruct")
# Ops that onnx's shape inference computes values through, besides those that join them.
_PASSED_ON = (
    "Add",
    "Cast",
    "Div",
    "Gather",
    "Identity",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
    "Where",
)


def check_number_of_nodes(path: Path, model: onnx.ModelProto) -> None:
    """Refuse a graph that is too long, or grows too long when its functions are written out.

    Raises:
        UnsupportedModelError: If it has more than `MAX_NODES` nodes, functions and sub-graphs
            counted where they are used, or these are nested deeper than `MAX_NESTING`, or a
            function calls itself.
    """
    functions = {(f.domain, f.name): f.node for f in model.functions}
    known: dict[tuple[str, str], tuple[int, int]] = {}
    size, depth = _extent(path, model.graph.node, functions, known, ())
    if size > MAX_NODES:
        raise UnsupportedModelError(
            f"{path} has {size if size < 1 << 63 else 'over 2^63'} nodes with its functions "
            f"written out, expected at most {MAX_NODES}. Export the language model alone, "
            "without its sizes unrolled."
        )
    if depth > MAX_NESTING:
        raise _too_deep(path, depth)


def _too_deep(path: Path, depth: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} nests functions and sub-graphs {depth} deep, expected at most {MAX_NESTING}. "
        "Export the language model alone."
    )


def _extent(
    path: Path,
    nodes: Iterable[onnx.NodeProto],
    functions: Mapping[tuple[str, str], Sequence[onnx.NodeProto]],
    known: dict[tuple[str, str], tuple[int, int]],
    callers: tuple[tuple[str, str], ...],
) -> tuple[int, int]:
    """Return (nodes, depth) of a graph, functions and sub-graphs included."""
    if len(callers) > MAX_NESTING:
        raise _too_deep(path, len(callers))
    size = depth = 0
    for node in nodes:
        size += 1
        inside = []
        name = (node.domain, node.op_type)
        if name in functions:
            if name in callers:
                raise UnsupportedModelError(
                    f"{path}: the function {node.domain}::{node.op_type} calls itself, expected "
                    "functions that can be written out. Export the model again."
                )
            if name not in known:
                known[name] = _extent(
                    path, functions[name], functions, known, (*callers, name)
                )
            inside.append(known[name])
        for attribute in node.attribute:
            inside += [
                _extent(path, graph.node, functions, known, callers)
                for graph in (attribute.g, *attribute.graphs)
                if graph.node
            ]
        size += sum(part for part, _ in inside)
        depth = max([depth, *(1 + part for _, part in inside)])
    return size, depth


def check_sizes_of_shapes(path: Path, model: ir.Model) -> None:
    """Refuse shapes that grow: joined with themselves again and again, they fill the memory.

    Args:
        path: The file, for the message.
        model: Its graph, functions written out.

    Raises:
        UnsupportedModelError: If whole numbers computed from shapes and constants are more than
            `MAX_SHAPE_VALUES` at one place.
    """
    import onnx_ir as ir

    sizes: dict[ir.Value, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Shape":
            size = _MAX_RANK
        elif node.op_type in _JOINED:
            size = sum(_num_values(value, sizes) for value in node.inputs)
        elif node.op_type in _PASSED_ON:
            size = max((_num_values(value, sizes) for value in node.inputs), default=0)
        else:
            continue
        if size > MAX_SHAPE_VALUES:
            raise UnsupportedModelError(
                f"{path} computes over {MAX_SHAPE_VALUES} whole numbers from shapes and "
                f"constants at {node.name or node.op_type!r}, expected the few of a shape. "
                "Export the language model alone."
            )
        sizes |= dict.fromkeys(node.outputs, size)


def _num_values(value: ir.Value | None, sizes: Mapping[ir.Value, int]) -> int:
    """Return the number of whole numbers that are known of a value without running it."""
    import onnx_ir as ir

    if value is None:
        return 0
    constant = value.const_value
    is_whole = constant is not None and constant.dtype in (
        ir.DataType.INT32,
        ir.DataType.INT64,
    )
    return constant.size if constant is not None and is_whole else sizes.get(value, 0)


def may_fold(node: ir.Node) -> bool | None:
    """Say for the optimizer whether to compute a node of constants: False, or as it likes."""
    for value in node.outputs:
        dims = [dim for dim in value.shape if isinstance(dim, int)] if value.shape else []
        if math.prod(dims) > MAX_FOLDED_VALUES:
            return False
    return None
