"""Recognise rotary position embedding.

Before:  x * cos + concat(-x[half:], x[:half]) * sin      x [batch, num_heads, rows, head_dim]
After:   RotaryEmbedding(x, cos[..., :half], sin[..., :half])

cos and sin stay computed from `position_ids` in the graph, since a sparse decoder's positions
are not a range. One pair of half tables serves all layers.

Requires  nothing.
Ensures   every matched head uses the op; cos and sin are [batch, rows, head_dim / 2].
Absence is normal: a graph that already has RotaryEmbedding is left alone.
"""

from __future__ import annotations

import dataclasses

import onnx_graphsurgeon as gs

from dllava_export.errors import PostconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import GraphBuilder, replace_value
from dllava_export.passes.patterns import (
    constant_values,
    producer_of,
    scalar_value,
    unordered_inputs,
)

__all__ = ["FuseRotaryEmbeddingPass"]


@dataclasses.dataclass(frozen=True)
class FuseRotaryEmbeddingPass(Pass):
    """Replace the half-rotation form of rotary embedding by the ONNX op RotaryEmbedding."""

    def apply(self, graph: gs.Graph) -> bool:
        """Replace every match; return True where there was one."""
        matches = [m for node in graph.nodes if (m := _match(node)) is not None]
        halves: dict[int, gs.Variable] = {}
        for number, match in enumerate(matches):
            cos = _half(graph, match.cos, "cos", halves)
            sin = _half(graph, match.sin, "sin", halves)
            rotated = GraphBuilder(graph, f"rotary.{number}").op(
                "RotaryEmbedding",
                [match.x, cos, sin],
                "rotated",
                match.output.dtype,
                match.output.shape,
                interleaved=0,
            )
            replace_value(graph, match.output, rotated)
        return bool(matches)

    def ensures(self, graph: gs.Graph) -> None:
        """No match may be left."""
        for node in graph.nodes:
            if _match(node) is not None:
                raise PostconditionError(f"The rotary embedding at {node.name!r} was left.")


@dataclasses.dataclass(frozen=True)
class _Match:
    x: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor
    output: gs.Variable


def _match(node: gs.Node) -> _Match | None:
    if node.op != "Add" or len(node.inputs) != 2:
        return None
    for plain, turned in unordered_inputs(node):
        plain_mul, turned_mul = producer_of(plain, "Mul"), producer_of(turned, "Mul")
        if plain_mul is None or turned_mul is None:
            continue
        for x, cos in unordered_inputs(plain_mul):
            for half_turned, sin in unordered_inputs(turned_mul):
                if _is_half_rotation(half_turned, x):
                    cos_table, sin_table = _table(cos), _table(sin)
                    if cos_table is not None and sin_table is not None:
                        return _Match(x, cos_table, sin_table, node.outputs[0])
    return None


def _is_half_rotation(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    """True for concat(-x[..., half:], x[..., :half])."""
    concat = producer_of(tensor, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return False
    negation = producer_of(concat.inputs[0], "Neg")
    second = (
        producer_of(negation.inputs[0], "Slice", "Split") if negation is not None else None
    )
    first = producer_of(concat.inputs[1], "Slice", "Split")
    if (
        first is None
        or second is None
        or first.inputs[0] is not x
        or second.inputs[0] is not x
    ):
        return False
    if first.op == "Split":
        return (
            first is second
            and first.outputs[0] is concat.inputs[1]
            and first.outputs[0].shape == first.outputs[1].shape
        )
    begin, half = constant_values(first.inputs[1]), constant_values(first.inputs[2])
    start = constant_values(second.inputs[1])
    return (
        begin is not None
        and half is not None
        and start is not None
        and begin.item() == 0
        and half.item() == start.item()
        and x.shape is not None
        and x.shape[-1] == 2 * half.item()
    )


def _table(tensor: gs.Tensor) -> gs.Tensor | None:
    """Return the [batch, rows, head_dim] table below an Unsqueeze at axis 1, else None.

    Its halves must be equal, as the op takes one of them.
    """
    unsqueeze = producer_of(tensor, "Unsqueeze")
    if unsqueeze is None:
        return None
    axes = constant_values(unsqueeze.inputs[1])
    is_head_axis = axes is not None and list(axes.reshape(-1)) == [1]
    table = unsqueeze.inputs[0]
    return table if is_head_axis and _has_equal_halves(table) else None


def _has_equal_halves(table: gs.Tensor) -> bool:
    """True for an elementwise function of concat(x, x), and for rows of such a constant."""
    node = producer_of(table, "Cos", "Sin", "Cast", "Identity", "Mul", "Gather")
    if node is not None and (node.op != "Mul" or scalar_value(node.inputs[1]) is not None):
        return _has_equal_halves(node.inputs[0])
    values = constant_values(table)
    if values is not None and values.ndim > 0:
        half = values.shape[-1] // 2
        return bool((values[..., :half] == values[..., half:]).all())
    concat = producer_of(table, "Concat")
    return concat is not None and len({id(tensor) for tensor in concat.inputs}) == 1


def _half(
    graph: gs.Graph, table: gs.Tensor, what: str, halves: dict[int, gs.Variable]
) -> gs.Variable:
    if id(table) not in halves:
        builder = GraphBuilder(graph, "rotary")
        half = int(table.shape[-1]) // 2
        halves[id(table)] = builder.op(
            "Slice",
            [table, builder.ints(0), builder.ints(half), builder.ints(-1)],
            what,
            table.dtype,
            [*table.shape[:-1], half],
        )
    return halves[id(table)]
