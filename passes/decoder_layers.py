"""Find the decoder layers of a normalised graph by their structure, never by node names.

A layer is: residual stream ► norm ► q, k, v ► attention ► o_proj ► add to the residual
stream ► norm ► MLP ► add to the residual stream. Each layer starts where the one before ends.
"""

from __future__ import annotations

import dataclasses
import itertools

import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PreconditionError
from dllava_export.passes.patterns import descendants, producer, producer_of

__all__ = ["DecoderLayer", "find_decoder_layers", "find_final_logits"]

_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclasses.dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer. All three tensors are [batch, rows, hidden_size]."""

    index: int
    attention: gs.Node
    hidden_in: gs.Tensor
    hidden_mid: gs.Variable
    hidden_out: gs.Variable


def find_decoder_layers(graph: gs.Graph) -> list[DecoderLayer]:
    """Return the decoder layers, first to last.

    Raises:
        PreconditionError: If there are none, or the structure breaks somewhere; the message
            names the layer and the node where it does.
    """
    attentions = [node for node in graph.nodes if _is_attention(node)]
    if not attentions:
        raise PreconditionError(
            "The graph has no causal attention over rows; expected Attention with q_num_heads "
            "or ai.dllava::KVCacheAttention. Run the fusing passes first."
        )
    layers = [_layer(index, node) for index, node in enumerate(attentions)]
    for before, after in itertools.pairwise(layers):
        start = _before_selection(after.hidden_in)
        if start is not before.hidden_out:
            raise PreconditionError(
                f"Decoder layer {after.index} starts at {after.hidden_in.name!r}, expected "
                f"the output {before.hidden_out.name!r} of layer {before.index}. Only plain "
                "stacks of decoder layers are supported."
            )
    return layers


def find_final_logits(graph: gs.Graph, last_layer: DecoderLayer) -> gs.Variable:
    """Return the one graph output that depends on the last layer and is not a cache."""
    hidden = last_layer.hidden_out
    after = {id(t) for node in descendants(hidden) for t in node.outputs} | {id(hidden)}
    found = [tensor for tensor in graph.outputs if id(tensor) in after]
    if len(found) != 1:
        raise PreconditionError(
            f"{len(found)} graph outputs depend on the last decoder layer "
            f"({[t.name for t in found]}), expected only the logits. Export without hidden "
            "states and losses."
        )
    return found[0]


def _is_attention(node: gs.Node) -> bool:
    if node.domain == names.DOMAIN:
        return node.op == "KVCacheAttention"
    return node.op == "Attention" and bool(node.attrs.get("is_causal"))


def _layer(index: int, attention: gs.Node) -> DecoderLayer:
    norm = _norm_before(attention)
    if norm is None:
        raise PreconditionError(
            f"Decoder layer {index}: the query of {attention.name!r} does not come from a "
            f"norm through one projection; expected {' or '.join(_NORMS)}, MatMul and, at most, "
            "a bias and a rotary embedding."
        )
    hidden_in = norm.inputs[0]
    hidden_mid = _residual_sum(attention.outputs[0], hidden_in)
    if hidden_mid is None:
        raise PreconditionError(
            f"Decoder layer {index}: the output of {attention.name!r} is not added back to "
            f"{hidden_in.name!r} after one projection. Parallel attention and MLP blocks are "
            "not supported."
        )
    norms = [node for node in hidden_mid.outputs if node.op in _NORMS]
    reached = {id(node) for norm in norms for node in descendants(norm.outputs[0])}
    sums = [n for n in hidden_mid.outputs if n.op == "Add" and id(n) in reached]
    if len(sums) != 1:
        raise PreconditionError(
            f"Decoder layer {index}: found {len(sums)} residual additions after "
            f"{hidden_mid.name!r}, expected one that closes norm and MLP."
        )
    return DecoderLayer(index, attention, hidden_in, hidden_mid, sums[0].outputs[0])


def _norm_before(attention: gs.Node) -> gs.Node | None:
    tensor = attention.inputs[0]
    rotary = producer_of(tensor, "RotaryEmbedding")
    if rotary is not None:
        tensor = rotary.inputs[0]
    bias = producer_of(tensor, "Add")
    if bias is not None:
        products = (t for t in bias.inputs if producer_of(t, "MatMul", "Gemm"))
        tensor = next(products, tensor)
    projection = producer_of(tensor, "MatMul", "Gemm")
    return producer_of(projection.inputs[0], *_NORMS) if projection is not None else None


def _residual_sum(tensor: gs.Variable, residual: gs.Tensor) -> gs.Variable | None:
    for _ in range(4):  # projection, bias, and the sum, with one node to spare
        if len(tensor.outputs) != 1:
            return None
        node = tensor.outputs[0]
        tensor = node.outputs[0]
        if node.op == "Add" and any(t is residual for t in node.inputs):
            return tensor
    return None


def _before_selection(tensor: gs.Tensor) -> gs.Tensor:
    """Step back over the row gathers of selections that are already in the graph."""
    node = producer(tensor)
    while node is not None and node.op == "GatherTokens":
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor
