"""Compute query, key and value as one product, for ONNX Runtime's CPU provider.

Before:  query = FusedMatMul(x, Wq);  key = FusedMatMul(x, Wk);  value = FusedMatMul(x, Wv);
         GroupQueryAttention(query, key, value, do_rotary=1)
After:   FusedMatMul(x, Concat(Wq, Wk, Wv)) ► GroupQueryAttention(packed, do_rotary=1)

ONNX Runtime folds the Concat when it loads the model. Where attention does not rotate:

Before:  query ► RotaryEmbedding;  key ► RotaryEmbedding;  GroupQueryAttention(query, key, value)
After:   packed ► RotaryEmbedding ► GroupQueryAttention(packed)

The rotation runs over heads as if they were rows; where a row is a head of values its cosine is
1 and its sine 0 (`head_tables.py`).

Requires  GroupQueryAttention, that is `LowerForOnnxRuntimePass`.
Ensures   no attention is left that could be packed.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export.errors import PostconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import GraphBuilder, Shape
from dllava_export.passes.head_tables import HeadTables
from dllava_export.passes.patterns import producer, rotations

__all__ = ["PackProjectionsPass"]


@dataclasses.dataclass(frozen=True)
class PackProjectionsPass(Pass):
    """Pack the three projections of every float32 attention."""

    def apply(self, graph: gs.Graph) -> bool:
        """Pack every match; return True where there was one."""
        matches = [m for node in graph.nodes if (m := _match(node)) is not None]
        tables: dict[tuple[int, int], HeadTables] = {}
        for number, match in enumerate(matches):
            builder = GraphBuilder(graph, f"packed.{number}")
            heads = match.num_rotated, match.num_heads
            if heads not in tables:
                tables[heads] = HeadTables(builder.scoped("tables"), *heads)
            _pack(builder, match, tables[heads])
        return bool(matches)

    def ensures(self, graph: gs.Graph) -> None:
        """No match may be left."""
        for node in graph.nodes:
            if _match(node) is not None:
                raise PostconditionError(f"The projections of {node.name!r} were not packed.")


@dataclasses.dataclass(frozen=True)
class _Match:
    attention: gs.Node
    x: gs.Tensor
    weights: tuple[gs.Constant, ...]
    tables: tuple[gs.Tensor, gs.Tensor] | None

    @property
    def num_rotated(self) -> int:
        """Heads of queries and keys."""
        return self.attention.attrs["num_heads"] + self.attention.attrs["kv_num_heads"]

    @property
    def num_heads(self) -> int:
        """All heads, those of values too."""
        return self.num_rotated + self.attention.attrs["kv_num_heads"]

    @property
    def width(self) -> int:
        """Of the packed product."""
        return sum(weight.shape[0] for weight in self.weights)


def _match(attention: gs.Node) -> _Match | None:
    """Match from the attention op upwards."""
    if attention.op != "GroupQueryAttention" or not _has_rank_3(attention.outputs[0]):
        return None
    query, key, value = attention.inputs[:3]
    if len(query.outputs) > 1 or len(key.outputs) > 1:
        return None  # a policy reads them too, and would need them apart from the packed ones
    tables = None
    if not attention.attrs.get("do_rotary", 0):
        found = rotations(attention)
        if found is None:
            return None
        query, key = (rotation.inputs[0] for rotation in found)
        tables = tuple(found[0].inputs[1:3])
        if not all(_has_rank_3(table) for table in tables):
            return None
    projections = [_projection(tensor) for tensor in (query, key, value)]
    if any(found is None for found in projections):
        return None
    inputs, weights = zip(*projections, strict=True)
    if any(x is not inputs[0] for x in inputs):
        return None
    return _Match(attention, inputs[0], weights, tables)


def _has_rank_3(tensor: gs.Tensor) -> bool:
    """True where batch and rows can be read from the tensor's shape."""
    return tensor.shape is not None and len(tensor.shape) == 3


def _projection(tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Constant] | None:
    """Return what a float32 product by a stored weight multiplies."""
    product = producer(tensor)
    if product is None or product.op != "FusedMatMul" or product.attrs != {"transB": 1}:
        return None
    x, weight = product.inputs
    is_weight = isinstance(weight, gs.Constant) and weight.dtype == np.float32
    # What else reads the projection would still need it on its own.
    return (x, weight) if is_weight and len(tensor.outputs) == 1 else None


def _pack(builder: GraphBuilder, match: _Match, tables: HeadTables) -> None:
    batch, rows, _ = match.attention.outputs[0].shape
    weight = builder.op(
        "Concat",
        list(match.weights),
        "weight",
        np.float32,
        [match.width, match.weights[0].shape[1]],
        axis=0,
    )
    packed = builder.op(
        "FusedMatMul",
        [match.x, weight],
        "projected",
        np.float32,
        [batch, rows, match.width],
        domain="com.microsoft",
        transB=1,
    )
    if match.tables is not None:
        given = zip(match.tables, ("Cos", "Sin"), strict=True)
        packed = _rotate(builder, packed, match, [tables.table(*one) for one in given])
    nothing = [gs.Variable.empty(), gs.Variable.empty()]
    match.attention.inputs = [packed, *nothing, *match.attention.inputs[3:]]


def _rotate(
    builder: GraphBuilder, product: gs.Variable, match: _Match, tables: list[gs.Variable]
) -> gs.Variable:
    """Rotate heads as if they were rows."""
    batch, rows, width = product.shape
    head_dim = width // match.num_heads
    heads_shape = [batch, None, head_dim]
    heads = _reshape(builder, product, [0, -1, head_dim], "heads", heads_shape)
    turned = builder.op(
        "RotaryEmbedding", [heads, *tables], "rotated", np.float32, heads_shape, num_heads=1
    )
    return _reshape(builder, turned, [0, -1, width], "packed", [batch, rows, width])


def _reshape(
    builder: GraphBuilder, value: gs.Tensor, target: list[int], what: str, shape: Shape
) -> gs.Variable:
    return builder.op("Reshape", [value, builder.ints(*target)], what, np.float32, shape)
