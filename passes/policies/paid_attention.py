"""What policies share that look at attention: keys by head, and what a few rows pay to all.

    paid[i, j] = mean over heads h of softmax over j' <= i of (scale * q[i, h] . k[j', h'])[j]

for few reading rows i and all rows j, with h' the key head of h. Fused attention gives no
weights away, so they are computed again: one product of a few rows, never rows x rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.passes.policies.base import AttentionArrays, AttentionRows
from dllava_export.passes.policies.scores import F32

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.passes.graph_builder import GraphBuilder

__all__ = [
    "key_heads",
    "last_prompt_row",
    "paid_attention",
    "paid_attention_arrays",
    "row_numbers",
]

_LOWEST = -3.0e38  # a finite stand-in for minus infinity
_PROMPT = (names.PROMPT_TEXT, names.IMAGE)


def key_heads(builder: GraphBuilder, attention: AttentionRows) -> gs.Variable:
    """Return keys by head, [batch, rows, num_kv_heads, head_dim] float32."""
    batch, num_rows, width = attention.key.shape
    heads, size = attention.num_kv_heads, attention.head_dim
    key = builder.op("Cast", [attention.key], "key_f32", F32, [batch, num_rows, width], to=1)
    split = builder.constant("key_split", [0, 0, heads, size], np.int64)
    shape = [batch, num_rows, heads, size]
    return builder.op("Reshape", [key, split], "key_heads", F32, shape)


def row_numbers(builder: GraphBuilder, token_kind: gs.Tensor) -> gs.Variable:
    """Return 0, 1, 2, ... for the rows that are fed, [rows] int64."""
    zero, one = builder.scalar(0, np.int64), builder.scalar(1, np.int64)
    count = builder.op("Shape", [token_kind], "count", np.int64, [1], start=1, end=2)
    scalar = builder.constant("scalar_shape", [], np.int64)
    limit = builder.op("Reshape", [count, scalar], "limit", np.int64, [])
    return builder.op("Range", [zero, limit, one], "row", np.int64, [token_kind.shape[1]])


def last_prompt_row(
    builder: GraphBuilder, token_kind: gs.Tensor, row: gs.Variable
) -> gs.Variable:
    """Return the last row of each prompt, [batch, 1] int64; 0 where no row is of a prompt.

    It is not the last valid row: a pass without KV cache feeds generated rows behind it, and
    must keep the image rows that prefill kept.
    """
    shape = list(token_kind.shape)
    kinds = [builder.scalar(kind, np.int64) for kind in _PROMPT]
    parts = [
        builder.op("Equal", [token_kind, kind], "is_of_kind", bool, shape) for kind in kinds
    ]
    is_prompt = builder.op("Or", parts, "is_prompt", bool, shape)
    zero = builder.scalar(0, np.int64)
    number = builder.op("Where", [is_prompt, row, zero], "prompt_row", np.int64, shape)
    return builder.op(
        "ReduceMax", [number, builder.ints(1)], "last_row", np.int64, [shape[0], 1], keepdims=1
    )


def paid_attention(
    builder: GraphBuilder, attention: AttentionRows, row: gs.Variable, reader: gs.Variable
) -> tuple[gs.Variable, gs.Variable]:
    """Return attention that some rows pay to all rows, mean over heads.

    Args:
        builder: Where new nodes are named.
        attention: Queries and keys.
        row: From `row_numbers`.
        reader: [batch, num_readers] int64, row numbers; what those of -1 pay means nothing.

    Returns:
        paid [batch, num_readers, rows] float32; visible [batch, num_readers, rows] bool, rows
        up to the reader itself, none for a reader of -1. Padding stands behind all readers.
    """
    batch, num_readers = reader.shape
    num_rows, width = row.shape[0], attention.query.shape[-1]
    kv_heads, size = attention.num_kv_heads, attention.head_dim
    group = attention.num_heads // kv_heads
    zero = builder.scalar(0, np.int64)
    index = builder.op("Max", [reader, zero], "reader_row", np.int64, [batch, num_readers])
    shape = [batch, num_readers, width]
    query = builder.op(
        "GatherTokens",
        [attention.query, index],
        "reader_query",
        attention.query.dtype,
        shape,
        domain=names.DOMAIN,
    )
    query = builder.op("Cast", [query], "query_f32", F32, shape, to=1)
    scale = builder.scalar(attention.scale, F32)
    query = builder.op("Mul", [query, scale], "query_scaled", F32, shape)
    split = builder.constant("query_split", [0, 0, kv_heads, group, size], np.int64)
    shape = [batch, num_readers, kv_heads, group, size]
    query = builder.op("Reshape", [query, split], "query_heads", F32, shape)
    shape = [batch, kv_heads, group, num_readers, size]
    query = builder.op("Transpose", [query], "query_t", F32, shape, perm=[0, 2, 3, 1, 4])
    key = key_heads(builder, attention)
    shape = [batch, kv_heads, size, num_rows]
    key = builder.op("Transpose", [key], "key_t", F32, shape, perm=[0, 2, 3, 1])
    shape = [batch, kv_heads, 1, size, num_rows]
    key = builder.op("Unsqueeze", [key, builder.ints(2)], "key_groups", F32, shape)
    table = [batch, kv_heads, group, num_readers, num_rows]
    product = builder.op("MatMul", [query, key], "product", F32, table)
    column = builder.op(
        "Unsqueeze",
        [reader, builder.ints(-1)],
        "reader_column",
        np.int64,
        [batch, num_readers, 1],
    )
    shape = [batch, num_readers, num_rows]
    visible = builder.op("LessOrEqual", [row, column], "visible", bool, shape)
    mask = builder.op(
        "Unsqueeze",
        [visible, builder.ints(1, 2)],
        "mask",
        bool,
        [batch, 1, 1, num_readers, num_rows],
    )
    lowest = builder.scalar(_LOWEST, F32)
    masked = builder.op("Where", [mask, product, lowest], "masked", F32, table)
    weights = builder.op("Softmax", [masked], "weights", F32, table, axis=-1)
    paid = builder.op(
        "ReduceMean", [weights, builder.ints(1, 2)], "paid", F32, shape, keepdims=0
    )
    return paid, visible


def paid_attention_arrays(attention: AttentionArrays, reader: np.ndarray) -> np.ndarray:
    """Return the same in NumPy, [num_readers, rows] float64; readers are valid rows."""
    key = attention.key.astype(np.float64)
    query = attention.query[reader].astype(np.float64)
    groups = query.shape[1] // key.shape[1]
    key = np.repeat(key, groups, axis=1)
    product = attention.scale * np.einsum("ihd,jhd->hij", query, key)
    visible = np.arange(len(key)) <= reader[:, None]
    product = np.where(visible, product, -np.inf)
    weights = np.exp(product - product.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).mean(0)
