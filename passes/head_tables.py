"""Rotary tables with a row per head, for a rotation that runs over heads as if they were rows.

Heads that are not rotated get the cosine 1 and the sine 0. Tables that are cosine and sine of
position * frequency are computed anew, with frequencies of 0 for those heads: in a decode step
of a small model every node costs, and these are half as many as repeating the tables takes.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.patterns import constant_values, producer, producer_of, scalar_value

__all__ = ["HeadTables"]

_NOT_ROTATED = {"Cos": 1.0, "Sin": 0.0}


class HeadTables:
    """Makes each table once, for all layers that share it.

    Args:
        builder: Adds the nodes.
        num_rotated: Heads that are rotated; they come first.
        num_heads: All heads.
    """

    def __init__(self, builder: GraphBuilder, num_rotated: int, num_heads: int) -> None:
        self._builder = builder
        self._is_rotated = np.arange(num_heads) < num_rotated
        self._made: dict[tuple[str, int], gs.Variable] = {}

    def table(self, given: gs.Tensor, function: str) -> gs.Variable:
        """Return [batch, rows * heads, head_dim / 2].

        Args:
            given: [batch, rows, head_dim / 2] float32, cosines or sines.
            function: `Cos` or `Sin`: which of them.
        """
        key = f"table {function}", id(given)
        if key not in self._made:
            batch, _, half = given.shape
            inputs = [self._joined(given, function), self._builder.ints(0, -1, half)]
            self._made[key] = self._builder.op(
                "Reshape", inputs, "table", np.float32, [batch, None, half]
            )
        return self._made[key]

    def _joined(self, given: gs.Tensor, function: str) -> gs.Variable:
        """Return [batch, rows, ...] with the tables of all heads in every row."""
        key = function, id(given)
        if key not in self._made:
            gather, angles = producer(given), _angles(given, function)
            if gather is not None and gather.op == "GatherTokens":
                self._made[key] = self._gathered(gather, function)
            elif angles is not None:
                self._made[key] = self._computed(angles, function)
            else:
                self._made[key] = self._repeated(given, _NOT_ROTATED[function])
        return self._made[key]

    def _gathered(self, gather: gs.Node, function: str) -> gs.Variable:
        data, kept = self._joined(gather.inputs[0], function), gather.inputs[1]
        shape = [*gather.outputs[0].shape[:2], *data.shape[2:]]
        return self._builder.op(
            gather.op, [data, kept], "kept", np.float32, shape, domain=gather.domain
        )

    def _computed(self, angles: gs.Node, function: str) -> gs.Variable:
        position, frequencies = angles.inputs
        key = "angles", id(angles)
        if key not in self._made:
            one = constant_values(frequencies)
            assert one is not None  # `_angles` saw them
            every = self._is_rotated[:, None] * one.reshape(1, -1)
            inputs = [
                position,
                self._builder.constant("frequencies", every.ravel(), np.float32),
            ]
            shape = [*position.shape[:2], every.size]
            self._made[key] = self._builder.op("Mul", inputs, "angles", np.float32, shape)
        inputs = [self._made[key]]
        return self._builder.op(
            function, inputs, function.lower(), np.float32, inputs[0].shape
        )

    def _repeated(self, given: gs.Tensor, not_rotated: float) -> gs.Variable:
        builder, (batch, rows, half) = self._builder, given.shape
        inputs = [given, builder.ints(2)]
        column = builder.op("Unsqueeze", inputs, "column", np.float32, [batch, rows, 1, half])
        mask = builder.constant("is_rotated", self._is_rotated[None, None, :, None], bool)
        inputs = [mask, column, builder.scalar(not_rotated, np.float32)]
        shape = [batch, rows, len(self._is_rotated), half]
        return builder.op("Where", inputs, "filled", np.float32, shape)


def _angles(table: gs.Tensor, function: str) -> gs.Node | None:
    """Return Mul(position [batch, rows, 1], frequencies [head_dim / 2]).

    None unless the table is the first half of the function of concat(angles, angles).
    """
    nodes: list[gs.Node] = []
    for op in ("Slice", function, "Concat", "Mul"):
        node = producer_of(nodes[-1].inputs[0] if nodes else table, op)
        if node is None:
            return None
        nodes.append(node)
    half, _, twice, angles = nodes
    position, frequencies = angles.inputs[0], constant_values(angles.inputs[1])
    is_match = (
        len(half.inputs) == 4  # without steps
        and scalar_value(half.inputs[1]) == 0
        and len(twice.inputs) == 2
        and all(tensor is angles.outputs[0] for tensor in twice.inputs)
        and position.shape is not None
        and len(position.shape) == 3
        and position.shape[-1] == 1
        and frequencies is not None
        and frequencies.size == table.shape[-1]
    )
    return angles if is_match else None
