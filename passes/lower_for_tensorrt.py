"""Fit a portable graph to TensorRT: static cache capacities, attention it has kernels for.

Before:  past_key_values.* [batch, kv_num_heads, capacity_full, head_dim], capacity symbolic
After:   the same with the capacity as a number, as TensorRT asks of a KV cache
Before:  KVCacheAttention or Attention in a type or head_dim that TensorRT has no kernel for
After:   TensorScatter; MatMul, Where, Softmax in float32, MatMul

An Attention node becomes TensorRT's attention layer, which must run in one dedicated kernel:
the ONNX parser offers no way to mark it decomposable. Kernels exist for float16 and bfloat16
with a head_dim of 16 to 256 that 8 divides, and for no float32 (TensorRT-RTX 1.7.1, each of
8 to 256 built). Where there is one the node stays; elsewhere standard nodes compute it.

Requires  Attention nodes, if any, of three inputs and one output.
Ensures   no symbolic capacity in inputs and outputs; no attention without a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError, SettingError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import GraphBuilder, replace_value

__all__ = ["LowerForTensorRTPass", "has_attention_kernel"]

_KERNEL_DTYPES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_MIN_HEAD_DIM, _MAX_HEAD_DIM, _HEAD_DIM_UNIT = 16, 256, 8
_LOWEST = -3.0e38  # a finite stand-in for minus infinity
_CACHED, _PLAIN = "KVCacheAttention", "Attention"
_NUM_PLAIN_INPUTS, _NUM_SPLIT_AXES = 3, 4


@dataclasses.dataclass(frozen=True)
class LowerForTensorRTPass(Pass):
    """Make capacities static and write out attention that TensorRT has no kernel for.

    Attributes:
        capacities: Cache group → rows of each of its buffers, spare row included; empty where
            there is no cache.
        plugin_ops: Custom ops that a plugin computes; their nodes are left alone.
    """

    capacities: Mapping[str, int]
    plugin_ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for group, rows in self.capacities.items():
            if rows < 1:
                raise SettingError(f"{names.capacity(group)} must be at least 1, got {rows}.")

    def requires(self, graph: gs.Graph) -> None:
        """Attention nodes must be of the form that this toolkit writes."""
        for node in graph.nodes:
            if _is_plain(node) and not _is_simple(node):
                raise PreconditionError(
                    f"Attention {node.name!r} has {len(node.inputs)} inputs, "
                    f"{len(node.outputs)} outputs, softcap {node.attrs.get('softcap', 0)}; "
                    "expected query, key, value in, one output, no softcap. Export the model "
                    "again."
                )

    def apply(self, graph: gs.Graph) -> bool:
        """Fix capacities, then lower attention; return True where anything changed."""
        modified = self._fix_capacities(graph)
        masks: dict[tuple[object, ...], gs.Variable] = {}
        for node in [node for node in graph.nodes if self._lacks_kernel(node)]:
            _write_out(graph, node, masks)
            modified = True
        return modified

    def ensures(self, graph: gs.Graph) -> None:
        """Nothing may be left that this pass replaces."""
        for tensor in (*graph.inputs, *graph.outputs):
            if set(tensor.shape or ()) & set(map(names.capacity, names.GROUPS)):
                raise PostconditionError(f"{tensor.name!r} has a symbolic capacity.")
        for node in graph.nodes:
            if self._lacks_kernel(node):
                raise PostconditionError(f"{node.name!r} was not written out.")

    def _fix_capacities(self, graph: gs.Graph) -> bool:
        sizes = {names.capacity(group): rows for group, rows in self.capacities.items()}
        modified = False
        for tensor in (*graph.inputs, *graph.tensors().values()):
            if isinstance(tensor, gs.Variable) and set(tensor.shape or ()) & set(sizes):
                tensor.shape = [sizes.get(size, size) for size in tensor.shape]
                modified = True
        return modified

    def _lacks_kernel(self, node: gs.Node) -> bool:
        if node.op in self.plugin_ops or not (_is_cached(node) or _is_plain(node)):
            return False
        return not has_attention_kernel(_onnx_type(node.inputs[0]), _head_dim(node))


def has_attention_kernel(dtype: int, head_dim: int) -> bool:
    """True where TensorRT has a dedicated attention kernel.

    Args:
        dtype: Type of query, key and value, a value of `onnx.TensorProto.DataType`.
        head_dim: Width of a head.
    """
    is_regular = head_dim % _HEAD_DIM_UNIT == 0
    return (
        dtype in _KERNEL_DTYPES and is_regular and _MIN_HEAD_DIM <= head_dim <= _MAX_HEAD_DIM
    )


def _is_cached(node: gs.Node) -> bool:
    return node.op == _CACHED and node.domain == names.DOMAIN


def _is_plain(node: gs.Node) -> bool:
    return node.op == _PLAIN and not node.domain


def _is_simple(node: gs.Node) -> bool:
    return (
        len(node.inputs) == _NUM_PLAIN_INPUTS
        and len(node.outputs) == 1
        and not node.attrs.get("softcap", 0)
    )


def _onnx_type(tensor: gs.Tensor) -> int:
    """Return a tensor's element type as ONNX numbers it."""
    if isinstance(tensor.dtype, int):
        return tensor.dtype
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))


def _head_dim(node: gs.Node) -> int:
    if _is_cached(node):
        return int(node.inputs[3].shape[-1])
    width = int(node.inputs[0].shape[-1])
    if len(node.inputs[0].shape) == _NUM_SPLIT_AXES:
        return width
    return width // int(node.attrs["q_num_heads"])


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Sizes of one attention; `groups` query heads share a key head."""

    dtype: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def groups(self) -> int:
        return self.num_heads // self.num_kv_heads


def _heads_of(node: gs.Node) -> _Heads:
    if len(node.inputs[0].shape) == _NUM_SPLIT_AXES:
        num_heads, num_kv_heads = (int(node.inputs[i].shape[1]) for i in (0, 1))
    else:
        key = "num_heads" if _is_cached(node) else "q_num_heads"
        num_heads, num_kv_heads = (int(node.attrs[k]) for k in (key, "kv_num_heads"))
    return _Heads(_onnx_type(node.inputs[0]), num_heads, num_kv_heads, _head_dim(node))


def _write_out(
    graph: gs.Graph, node: gs.Node, masks: dict[tuple[object, ...], gs.Variable]
) -> None:
    """Put standard nodes in an attention's place; masks are shared between layers."""
    builder = GraphBuilder(graph, f"tensorrt/{node.name}")
    heads = _heads_of(node)
    is_split = len(node.inputs[0].shape) == _NUM_SPLIT_AXES
    query, key, value = node.inputs[:3]
    if not is_split:
        query = _split_heads(builder, query, heads.num_heads, heads, "query")
        key = _split_heads(builder, key, heads.num_kv_heads, heads, "key")
        value = _split_heads(builder, value, heads.num_kv_heads, heads, "value")
    caches = []
    if _is_cached(node):
        key = _store(builder, node.inputs[3], key, node.inputs[5], "present_key")
        value = _store(builder, node.inputs[4], value, node.inputs[5], "present_value")
        caches = [key, value]
    mask = _mask_of(graph, node, masks)
    scale = float(node.attrs.get("scale", heads.head_dim**-0.5))
    output = _attend(builder, heads, (query, key, value), mask, scale)
    if not is_split:
        output = _merge_heads(builder, output, heads)
    old_outputs = list(node.outputs)
    node.outputs.clear()
    graph.nodes.remove(node)
    for old, new in zip(old_outputs, [output, *caches], strict=True):
        new.shape = old.shape or new.shape
        replace_value(graph, old, new)


def _split_heads(
    builder: GraphBuilder, rows: gs.Tensor, num_heads: int, heads: _Heads, what: str
) -> gs.Variable:
    """[batch, rows, heads * head_dim] -> [batch, heads, rows, head_dim]."""
    batch, num_rows = rows.shape[:2]
    split = builder.op(
        "Reshape",
        [rows, builder.ints(0, 0, num_heads, heads.head_dim)],
        f"{what}_split",
        heads.dtype,
        [batch, num_rows, num_heads, heads.head_dim],
    )
    shape = [batch, num_heads, num_rows, heads.head_dim]
    return builder.op(
        "Transpose", [split], f"{what}_heads", heads.dtype, shape, perm=[0, 2, 1, 3]
    )


def _merge_heads(builder: GraphBuilder, output: gs.Variable, heads: _Heads) -> gs.Variable:
    """[batch, heads, rows, head_dim] -> [batch, rows, heads * head_dim]."""
    batch, _, num_rows, _ = output.shape
    shape = [batch, num_rows, heads.num_heads, heads.head_dim]
    rows = builder.op(
        "Transpose", [output], "output_rows", heads.dtype, shape, perm=[0, 2, 1, 3]
    )
    width = heads.num_heads * heads.head_dim
    return builder.op(
        "Reshape",
        [rows, builder.ints(0, 0, width)],
        "output",
        heads.dtype,
        [batch, num_rows, width],
    )


def _store(
    builder: GraphBuilder, past: gs.Tensor, new: gs.Tensor, index: gs.Tensor, what: str
) -> gs.Variable:
    return builder.op(
        "TensorScatter",
        [past, new, index],
        what,
        _onnx_type(past),
        past.shape,
        axis=2,
        mode="linear",
    )


def _mask_of(
    graph: gs.Graph, node: gs.Node, masks: dict[tuple[object, ...], gs.Variable]
) -> gs.Variable | None:
    """Return which columns each row sees, [batch or 1, 1, rows, columns] bool, or None."""
    if not _is_cached(node) and not node.attrs.get("is_causal", 0):
        return None
    query = node.inputs[0]
    identity: tuple[object, ...]
    if _is_cached(node):
        identity = id(node.inputs[5]), int(node.inputs[3].shape[2]), _rows_of(query)
    else:
        identity = (_rows_of(query),)
    if identity not in masks:
        builder = GraphBuilder(graph, f"tensorrt/mask_{len(masks)}")
        masks[identity] = _add_mask(builder, node)
    return masks[identity]


def _rows_of(query: gs.Tensor) -> object:
    """Return what tells the row axes of two queries apart: a dimension's name."""
    rows = query.shape[-2]
    return rows if isinstance(rows, int | str) else id(query)


def _add_mask(builder: GraphBuilder, node: gs.Node) -> gs.Variable:
    query = node.inputs[0]
    axis = len(query.shape) - 2
    num_rows = query.shape[axis]
    zero, one = builder.scalar(0, np.int64), builder.scalar(1, np.int64)
    count = builder.op("Shape", [query], "num_rows", np.int64, [1], start=axis, end=axis + 1)
    end = builder.op("Squeeze", [count], "num_rows_scalar", np.int64, [])
    rows = builder.op("Range", [zero, end, one], "rows", np.int64, [num_rows])
    last = builder.ints(-1)
    row_column = builder.op("Unsqueeze", [rows, last], "row_column", np.int64, [num_rows, 1])
    if not _is_cached(node):
        return builder.op(
            "LessOrEqual", [rows, row_column], "visible", np.bool_, [num_rows, num_rows]
        )
    capacity = int(node.inputs[3].shape[2])
    columns = builder.constant("columns", np.arange(capacity), np.int64)
    batch = query.shape[0]
    first = builder.op(
        "Unsqueeze",
        [node.inputs[5], builder.ints(1, 2, 3)],
        "first_row",
        np.int64,
        [batch, 1, 1, 1],
    )
    shape = [batch, 1, num_rows, 1]
    cache_rows = builder.op("Add", [first, row_column], "cache_rows", np.int64, shape)
    shape = [batch, 1, num_rows, capacity]
    return builder.op("LessOrEqual", [columns, cache_rows], "visible", np.bool_, shape)


def _attend(
    builder: GraphBuilder,
    heads: _Heads,
    tensors: tuple[gs.Tensor, gs.Tensor, gs.Tensor],
    mask: gs.Variable | None,
    scale: float,
) -> gs.Variable:
    """softmax(scale * query * key^T, masked) * value; scores and softmax in float32.

    Rows of the query heads that share a key head follow each other: [batch, num_kv_heads,
    groups * rows, head_dim] would need the mask repeated, so they have an axis of their own.
    """
    query, key, value = tensors
    batch, _, num_rows, head_dim = query.shape
    columns = key.shape[2]
    lead: list[int | str] = [batch, heads.num_heads]
    if heads.groups > 1:
        lead = [batch, heads.num_kv_heads, heads.groups]
        query = builder.op(
            "Reshape",
            [query, builder.ints(0, heads.num_kv_heads, heads.groups, -1, head_dim)],
            "query_groups",
            heads.dtype,
            [*lead, num_rows, head_dim],
        )
        key, value = (_add_group_axis(builder, t, heads) for t in (key, value))
        if mask is not None and len(mask.shape) == _NUM_SPLIT_AXES:
            mask = _add_group_axis(builder, mask, heads)
    order = list(range(len(key.shape)))
    order[-2:] = reversed(order[-2:])
    shape = [key.shape[i] for i in order]
    key_t = builder.op("Transpose", [key], "key_t", heads.dtype, shape, perm=order)
    shape = [*lead, num_rows, columns]
    scores = builder.op("MatMul", [query, key_t], "product", heads.dtype, shape)
    weights = _softmax(builder, scores, mask, scale, heads.dtype)
    shape = [*lead, num_rows, head_dim]
    output = builder.op("MatMul", [weights, value], "weighted", heads.dtype, shape)
    if heads.groups == 1:
        return output
    return builder.op(
        "Reshape",
        [output, builder.ints(0, heads.num_heads, -1, head_dim)],
        "output_heads",
        heads.dtype,
        [batch, heads.num_heads, num_rows, head_dim],
    )


def _add_group_axis(builder: GraphBuilder, tensor: gs.Tensor, heads: _Heads) -> gs.Variable:
    shape = [*tensor.shape[:2], 1, *tensor.shape[2:]]
    what = f"{tensor.name.rsplit('/', 1)[-1]}_grouped"
    return builder.op("Unsqueeze", [tensor, builder.ints(2)], what, _onnx_type(tensor), shape)


def _softmax(
    builder: GraphBuilder,
    scores: gs.Variable,
    mask: gs.Variable | None,
    scale: float,
    dtype: int,
) -> gs.Variable:
    shape = scores.shape
    float32 = onnx.TensorProto.FLOAT
    if dtype != float32:
        scores = builder.op("Cast", [scores], "product_f32", np.float32, shape, to=float32)
    factor = builder.constant("scale", scale, np.float32)
    scores = builder.op("Mul", [scores, factor], "scores", np.float32, shape)
    if mask is not None:
        lowest = builder.constant("lowest", _LOWEST, np.float32)
        scores = builder.op("Where", [mask, scores, lowest], "masked", np.float32, shape)
    weights = builder.op("Softmax", [scores], "weights", np.float32, shape, axis=-1)
    if dtype != float32:
        weights = builder.op("Cast", [weights], "weights_cast", dtype, shape, to=dtype)
    return weights
