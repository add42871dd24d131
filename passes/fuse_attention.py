"""Recognise causal attention and bring it into one form.

Before:  q, k, v ► Reshape ► Transpose ► (rotary) ► (repeat heads) ► attention with a mask that
         some sub-graph computes ► Transpose ► Reshape      [batch, num_heads, rows, head_dim]
After:   q, k, v ► (rotary) ► Attention(is_causal=1)        [batch, rows, num_heads * head_dim]

Attention may stand as the ONNX op or as MatMul, scale, Add mask, Softmax, MatMul. The mask's
sub-graph is run on a small example and must come out causal: it is then dropped, together
with graph inputs that nothing else reads (`attention_mask`).

Requires  at least one attention, all of them causal.
Ensures   every Attention is causal and three-dimensional; no Softmax attention is left.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import GraphBuilder, replace_value
from dllava_export.passes.mask_evaluation import (
    evaluate_example,
    evaluate_mask,
    numbers_of_rows,
)
from dllava_export.passes.patterns import (
    constant_values,
    is_transpose,
    producer,
    producer_of,
    scalar_value,
    unordered_inputs,
)

__all__ = ["FuseAttentionPass"]

_TO_HEADS = [0, 2, 1, 3]


@dataclasses.dataclass(frozen=True)
class FuseAttentionPass(Pass):
    """Rewrite every attention as a causal, three-dimensional ONNX Attention without a mask."""

    def requires(self, graph: gs.Graph) -> None:
        """Some attention must be there, in a form this pass knows."""
        if not any(_is_done(node) or _match(node) for node in graph.nodes):
            ops = sorted({node.op for node in graph.nodes})
            raise PreconditionError(
                "No attention was recognised. Expected Attention nodes, or MatMul, Softmax, "
                f"MatMul over [batch, heads, rows, head_dim]; found the ops {', '.join(ops)}. "
                "Export the decoder without a KV cache, in inference mode."
            )

    def apply(self, graph: gs.Graph) -> bool:
        """Rewrite every match; return True where there was one."""
        matches = [m for node in graph.nodes if (m := _match(node)) is not None]
        inputs_before = [tensor for tensor in graph.inputs if tensor.outputs]
        checked: set[tuple[int, bool]] = set()
        guards: set[int] = set()
        for number, match in enumerate(matches):
            if match.mask is not None and (id(match.mask), match.is_causal) not in checked:
                _check_causal(graph, match.mask, match)
                checked.add((id(match.mask), match.is_causal))
            elif match.mask is None and not match.is_causal:
                raise PreconditionError(
                    f"Attention {number} ({match.where}) has no mask and is not causal; "
                    "a decoder's attention must be causal. Is this an encoder?"
                )
            if match.is_empty_row is not None and id(match.is_empty_row) not in guards:
                _check_never(graph, match.is_empty_row, match)
                guards.add(id(match.is_empty_row))
            _rewrite(graph, match, number)
        if matches:
            graph.cleanup(remove_unused_graph_inputs=False)
            for tensor in inputs_before:
                if not tensor.outputs:
                    graph.inputs.remove(tensor)
        return bool(matches)

    def ensures(self, graph: gs.Graph) -> None:
        """Nothing but the one form may be left."""
        for node in graph.nodes:
            if _match(node) is not None:
                raise PostconditionError(
                    f"Attention node {node.name!r} was not brought into the causal, "
                    "three-dimensional form."
                )


@dataclasses.dataclass(frozen=True)
class _Match:
    where: str
    query: gs.Tensor  # [batch, num_heads, rows, head_dim], as are the next two
    key: gs.Tensor
    value: gs.Tensor
    mask: gs.Tensor | None
    scale: float
    is_causal: bool
    is_empty_row: gs.Tensor | None  # condition under which the output is replaced by zero
    output: gs.Variable  # [batch, rows, num_heads * head_dim]


def _is_done(node: gs.Node) -> bool:
    if node.domain == names.DOMAIN:
        return node.op == "KVCacheAttention"
    return node.op == "Attention" and "q_num_heads" in node.attrs


def _match(node: gs.Node) -> _Match | None:
    found: _Found | None = None
    if node.op == "Attention" and not node.domain:
        _check_plain(node)
        found = None if _is_done(node) else _match_op(node)
    elif node.op == "MatMul" and not node.domain:
        found = _match_softmax(node)
    if found is None:
        return None
    guard = _empty_row_guard(node.outputs[0])
    output = _merged_heads(node.outputs[0] if guard is None else guard.outputs[0])
    if output is None:
        raise PreconditionError(
            f"The output of attention {node.name!r} is not merged back to [batch, rows, "
            "hidden] by Transpose and Reshape, so the layer cannot be rewritten."
        )
    query, key, value, mask, scale, is_causal = found
    is_empty_row = guard.inputs[0] if guard is not None else None
    return _Match(node.name, query, key, value, mask, scale, is_causal, is_empty_row, output)


_Found = tuple[gs.Tensor, gs.Tensor, gs.Tensor, gs.Tensor | None, float, bool]


def _check_plain(node: gs.Node) -> None:
    """Refuse what no later pass would keep."""
    has_past = any(not tensor.is_empty() for tensor in node.inputs[4:6])
    has_flat_mask = _is_done(node) and any(not t.is_empty() for t in node.inputs[3:4])
    softcap = float(node.attrs.get("softcap", 0))
    if has_past or has_flat_mask or softcap:
        found = "past keys" if has_past else f"softcap {softcap}" if softcap else "a mask"
        raise PreconditionError(
            f"Attention node {node.name!r} has {found}; expected plain causal attention. Export "
            "the decoder without a KV cache, and attention over [batch, heads, rows, head_dim]; "
            "capped scores are not supported."
        )


def _match_op(node: gs.Node) -> _Found:
    query, key, value = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
    scale = node.attrs.get("scale") or 1 / math.sqrt(int(query.shape[-1]))
    return query, key, value, mask, float(scale), bool(node.attrs.get("is_causal", 0))


def _match_softmax(node: gs.Node) -> _Found | None:
    """Match softmax(q k^T * scale + mask) v from its last MatMul."""
    weights, value = node.inputs
    softmax = producer_of(_without_nan_guard(_skip(weights, "Cast")), "Softmax")
    if softmax is None:
        return None
    scores, mask = _skip(softmax.inputs[0], "Cast"), None
    add = producer_of(scores, "Add")
    if add is not None:
        for product, other in unordered_inputs(add):
            if _scaled_product(product) is not None:
                scores, mask = product, other
                break
    scaled = _scaled_product(scores)
    if scaled is None:
        return None
    scale, product_node = scaled
    query_scale, query = _unscaled(product_node.inputs[0])
    key_scale, key_t = _unscaled(product_node.inputs[1])
    transposed = _before_transpose(key_t)
    if transposed is None:
        return None
    inner_scale, key = _unscaled(transposed)
    total = scale * query_scale * key_scale * inner_scale
    return query, key, value, mask, total, False


def _skip(tensor: gs.Tensor, *ops: str) -> gs.Tensor:
    while (node := producer_of(tensor, *ops)) is not None:
        tensor = node.inputs[0]
    return tensor


def _without_nan_guard(tensor: gs.Tensor) -> gs.Tensor:
    """Take off Where(IsNaN(x), 0, x), which speaks only of rows that see nothing."""
    where = producer_of(tensor, "Where")
    is_nan = producer_of(where.inputs[0], "IsNaN") if where is not None else None
    if where is None or is_nan is None or is_nan.inputs[0] is not where.inputs[2]:
        return tensor
    return where.inputs[2] if scalar_value(where.inputs[1]) == 0 else tensor


def _before_transpose(tensor: gs.Tensor) -> gs.Tensor | None:
    """Return [b, h, rows, d] from its transpose [b, h, d, rows], also one by way of [b h, ...]."""
    swap = producer(tensor)
    if is_transpose(swap, [0, 1, 3, 2]):
        return swap.inputs[0]
    split = producer_of(tensor, "Reshape")
    transpose = producer(split.inputs[0]) if split is not None else None
    if transpose is None or not is_transpose(transpose, [0, 2, 1]):
        return None
    merge = producer_of(transpose.inputs[0], "Reshape")
    if merge is None or len(merge.inputs[0].shape or ()) != 4:
        return None
    return merge.inputs[0]


def _unscaled(tensor: gs.Tensor) -> tuple[float, gs.Tensor]:
    """Return (factor, tensor) with a multiplication by a constant taken off."""
    node = producer_of(tensor, "Mul", "Div")
    if node is None:
        return 1.0, tensor
    value = scalar_value(node.inputs[1])
    if value is not None:
        return (value if node.op == "Mul" else 1 / value), node.inputs[0]
    return 1.0, tensor


def _scaled_product(tensor: gs.Tensor) -> tuple[float, gs.Node] | None:
    """Return (factor, MatMul node) of a matrix product times a constant, else None."""
    factor, inner = _unscaled(tensor)
    node = producer_of(inner, "MatMul")
    return (factor, node) if node is not None else None


def _empty_row_guard(tensor: gs.Variable) -> gs.Node | None:
    """Return the reader Where(condition, 0, tensor), None where there is no such reader."""
    node = _only_reader(tensor)
    if node is None or node.op != "Where" or node.inputs[2] is not tensor:
        return None
    return node if scalar_value(node.inputs[1]) == 0 else None


def _merged_heads(tensor: gs.Variable) -> gs.Variable | None:
    """Follow Reshape (same shape), Transpose, Reshape; return the last one's output."""
    node = _only_reader(tensor)
    if node is not None and node.op == "Reshape" and len(node.outputs[0].shape or ()) == 4:
        node = _only_reader(node.outputs[0])
    if node is None or not is_transpose(node, _TO_HEADS):
        return None
    merge = _only_reader(node.outputs[0])
    while merge is not None and merge.op in ("Identity", "Cast"):
        merge = _only_reader(merge.outputs[0])
    return merge.outputs[0] if merge is not None and merge.op == "Reshape" else None


def _only_reader(tensor: gs.Variable) -> gs.Node | None:
    return tensor.outputs[0] if len(tensor.outputs) == 1 else None


def _check_causal(graph: gs.Graph, mask: gs.Tensor, match: _Match) -> None:
    for rows in numbers_of_rows(graph, mask):
        causal = np.tril(np.ones((rows, rows), bool))
        allowed = evaluate_mask(graph, mask, batch=2, rows=rows)
        if match.is_causal:
            allowed = allowed & causal
        if allowed.shape[-2:] == causal.shape and (allowed == causal).all():
            continue
        raise PreconditionError(
            f"The mask {mask.name!r} of attention {match.where!r} is not causal: with {rows} "
            f"rows {_first_difference(allowed, causal)}. Sliding windows, prefix masks and "
            "attention in both directions are not supported; export a decoder with a KV cache "
            "without it."
        )


def _check_never(graph: gs.Graph, condition: gs.Tensor, match: _Match) -> None:
    """Refuse to drop a Where that replaces attention of rows which do see something."""
    if evaluate_example(graph, condition, batch=2, rows=5).any():
        raise PreconditionError(
            f"The output of attention {match.where!r} is set to zero where {condition.name!r} "
            "holds, and without padding it does. Expected a guard for rows that see nothing."
        )


def _first_difference(allowed: np.ndarray, causal: np.ndarray) -> str:
    if allowed.shape[-2:] != causal.shape:
        return (
            f"its shape is {list(allowed.shape)}, expected [..., {len(causal)}, {len(causal)}]"
        )
    *_, row, _ = np.argwhere(allowed != causal)[0]
    columns = np.flatnonzero(allowed.reshape(-1, *causal.shape)[:, row].any(axis=0))
    seen = f"rows {columns[0]} to {columns[-1]}" if len(columns) else "no row"
    return f"row {row} sees {seen}, expected rows 0 to {row}"


def _rewrite(graph: gs.Graph, match: _Match, number: int) -> None:
    builder = GraphBuilder(graph, f"attention.{number}")
    num_heads = int(match.query.shape[1])
    key, value = _without_repeat(match.key), _without_repeat(match.value)
    kv_num_heads = int(key.shape[1])
    inputs = [
        _rows_first(builder, tensor, what)
        for tensor, what in ((match.query, "query"), (key, "key"), (value, "value"))
    ]
    output = builder.op(
        "Attention",
        inputs,
        "output",
        match.output.dtype,
        [*inputs[0].shape[:2], num_heads * int(match.value.shape[-1])],
        is_causal=1,
        q_num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=match.scale,
    )
    replace_value(graph, match.output, output)


def _without_repeat(tensor: gs.Tensor) -> gs.Tensor:
    """Take off Unsqueeze, Expand, Reshape, which repeat KV heads for grouped queries."""
    reshape = producer_of(tensor, "Reshape")
    expand = producer_of(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = producer_of(expand.inputs[0], "Unsqueeze") if expand is not None else None
    axes = constant_values(unsqueeze.inputs[1]) if unsqueeze is not None else None
    if unsqueeze is None or axes is None or list(axes.reshape(-1)) != [2]:
        return tensor
    return unsqueeze.inputs[0]


def _rows_first(builder: GraphBuilder, tensor: gs.Tensor, what: str) -> gs.Tensor:
    """Return the [batch, rows, heads * head_dim] form of a [batch, heads, rows, head_dim] one.

    Raises:
        PreconditionError: If it does not come from Reshape and Transpose, rotated or not.
    """
    rotary = producer_of(tensor, "RotaryEmbedding")
    heads = rotary.inputs[0] if rotary is not None else tensor
    transpose = producer(heads)
    reshape = producer_of(transpose.inputs[0], "Reshape") if transpose is not None else None
    if reshape is None or not is_transpose(transpose, _TO_HEADS):
        raise PreconditionError(
            f"The {what} of {builder.scope} is computed by "
            f"{transpose.op if transpose is not None else 'a graph input'} "
            f"({heads.name!r}); expected Reshape to heads, Transpose and, at most, a rotary "
            "embedding. This position embedding or layout is not supported."
        )
    flat = reshape.inputs[0]
    if rotary is None:
        return flat
    return builder.op(
        "RotaryEmbedding",
        [flat, *rotary.inputs[1:]],
        f"{what}_rotated",
        flat.dtype,
        flat.shape,
        interleaved=0,
        num_heads=int(heads.shape[1]),
    )
