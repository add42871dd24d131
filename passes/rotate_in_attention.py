"""Let attention rotate queries and keys itself, for ONNX Runtime's CPU provider.

Before:  query ► RotaryEmbedding(cos, sin);  key ► RotaryEmbedding(cos, sin);
         GroupQueryAttention(query, key, value, ...);  cos, sin = f(position_ids)
After:   GroupQueryAttention(query, key, value, ..., cos, sin, do_rotary=1);
         cos, sin = f(0 ... num_positions - 1), which ONNX Runtime computes when it loads

The kernel takes the row of the cache for the position. So this holds for layers of the full cache
group only, where both are the same; where tokens are dropped the tables are gathered.

Requires  GroupQueryAttention, that is `LowerForOnnxRuntimePass`.
Ensures   no rotation is left that attention could do.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.patterns import producer, rotations

__all__ = ["RotateInAttentionPass"]

_HEAD_DIM_UNIT = 16  # the kernel rotates heads of multiples of this width
_PER_POSITION_OPS = ("Cast", "Concat", "Cos", "Identity", "Mul", "Sin", "Slice", "Unsqueeze")


@dataclasses.dataclass(frozen=True)
class RotateInAttentionPass(Pass):
    """Move the rotary embedding of every layer of the full cache group into its attention.

    Attributes:
        num_positions: Rows of the tables, which take 4 * head_dim bytes each; no sample may
            have more rows in its cache.
    """

    num_positions: int

    def apply(self, graph: gs.Graph) -> bool:
        """Move every match; return True where there was one."""
        matches = [m for node in graph.nodes if (m := _match(node)) is not None]
        if not matches:
            return False
        positions = _AllPositions(graph, self.num_positions)
        for match in matches:
            match.attention.inputs = [
                match.query.inputs[0],
                match.key.inputs[0],
                *match.attention.inputs[2:],
                *(positions.table(tensor) for tensor in match.tables),
            ]
            match.attention.attrs["do_rotary"] = 1
        return True

    def ensures(self, graph: gs.Graph) -> None:
        """No match may be left."""
        for node in graph.nodes:
            if _match(node) is not None:
                raise PostconditionError(f"The rotation before {node.name!r} was left.")


@dataclasses.dataclass(frozen=True)
class _Match:
    attention: gs.Node
    query: gs.Node
    key: gs.Node

    @property
    def tables(self) -> list[gs.Variable]:
        """Cosines and sines, [batch, rows, head_dim / 2]."""
        return self.query.inputs[1:3]


def _match(attention: gs.Node) -> _Match | None:
    """Match from the attention op upwards."""
    if attention.op != "GroupQueryAttention" or attention.attrs.get("do_rotary", 0):
        return None
    past_key = attention.inputs[3]
    is_full = past_key.shape[2] == names.CAPACITY_FULL
    if not is_full or past_key.dtype != np.float32 or past_key.shape[3] % _HEAD_DIM_UNIT:
        return None
    found = rotations(attention)
    if found is None:
        return None
    match = _Match(attention, *found)
    return match if all(_is_per_position(table) for table in match.tables) else None


def _is_per_position(tensor: gs.Tensor) -> bool:
    """True for a constant, for `position_ids` and for what is computed from them row by row."""
    node = producer(tensor)
    if node is None:
        return isinstance(tensor, gs.Constant) or tensor.name == names.POSITION_IDS
    is_allowed = node.op in _PER_POSITION_OPS and not node.domain
    return is_allowed and all(_is_per_position(value) for value in node.inputs)


class _AllPositions:
    """Computes what depends on `position_ids` once more, for every position there may be."""

    def __init__(self, graph: gs.Graph, num_positions: int) -> None:
        self._builder = builder = GraphBuilder(graph, "rotary")
        limits = [builder.scalar(value, np.int64) for value in (0, num_positions, 1)]
        rows = builder.op("Range", limits, "rows", np.int64, [num_positions])
        inputs, shape = [rows, builder.ints(0)], [1, num_positions]
        positions = builder.op("Unsqueeze", inputs, "positions", np.int64, shape)
        self._known: dict[str, gs.Tensor] = {names.POSITION_IDS: positions}
        self._tables: dict[str, gs.Variable] = {}

    def table(self, tensor: gs.Variable) -> gs.Variable:
        """Return a [batch, rows, head_dim / 2] table's rows, [num_positions, head_dim / 2]."""
        if tensor.name not in self._tables:
            inputs = [self._again(tensor), self._builder.ints(0)]
            self._tables[tensor.name] = self._builder.op(
                "Squeeze", inputs, "table", np.float32, None
            )
        return self._tables[tensor.name]

    def _again(self, tensor: gs.Tensor) -> gs.Tensor:
        node = producer(tensor)
        if node is None or tensor.name in self._known:
            return self._known.get(tensor.name, tensor)
        inputs = [self._again(value) for value in node.inputs]
        result = self._builder.op(
            node.op, inputs, tensor.name, tensor.dtype, None, **node.attrs
        )
        self._known[tensor.name] = result
        return result
