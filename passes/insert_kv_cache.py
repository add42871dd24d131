"""Give every attention a KV cache that is written in place at a per-sample index.

Before:  q, k, v ► Attention(is_causal=1)
After:   q, k, v, past, write_index_full ► KVCacheAttention ► output, present

Adds `past_key_values.{i}.key/.value`, `present.{i}.key/.value` [batch, num_kv_heads,
capacity_full, head_dim], `write_index_full` and `next_write_index_full` [batch] int64. The
last cache row is a spare: a sample that must not grow writes there, never out of range.

Requires  decoder layers; `GatherLastRowPass` has run (it counts the valid rows).
Ensures   no attention without a cache.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.decoder_layers import DecoderLayer, find_decoder_layers
from dllava_export.passes.gather_last_row import row_lengths
from dllava_export.passes.graph_builder import GraphBuilder, Shape, find_input, replace_uses

__all__ = ["InsertKVCachePass", "insert_next_write_index"]


@dataclasses.dataclass(frozen=True)
class InsertKVCachePass(Pass):
    """Replace every causal Attention by KVCacheAttention, all layers in one capacity group."""

    def requires(self, graph: gs.Graph) -> None:
        """Valid rows must be counted."""
        if find_input(graph, names.TOKEN_KIND) is None:
            raise PreconditionError(
                f"The graph has no input {names.TOKEN_KIND!r}; run GatherLastRowPass first."
            )

    def apply(self, graph: gs.Graph) -> bool:
        """Replace the attentions; return False where all have a cache already."""
        layers = find_decoder_layers(graph)
        if all(layer.attention.op == "KVCacheAttention" for layer in layers):
            return False
        builder = GraphBuilder(graph, "kv_cache")
        write_index = builder.graph_input(
            names.write_index(names.FULL), np.int64, [names.BATCH]
        )
        lengths = row_lengths(graph)
        for layer in layers:
            _insert(graph, layer, write_index, lengths)
        past_key = find_input(graph, names.past(0, "key"))
        next_index = insert_next_write_index(builder, write_index, lengths, past_key)
        builder.graph_output(next_index, names.next_write_index(names.FULL))
        return True

    def ensures(self, graph: gs.Graph) -> None:
        """Nothing may attend outside its cache."""
        for layer in find_decoder_layers(graph):
            if layer.attention.op != "KVCacheAttention":
                raise PostconditionError(f"Decoder layer {layer.index} has no KV cache.")


def insert_next_write_index(
    builder: GraphBuilder, write_index: gs.Tensor, num_stored: gs.Tensor, past_key: gs.Tensor
) -> gs.Variable:
    """Add min(write_index + num_stored, capacity - 1), [batch] int64.

    The cap keeps the spare row out of the cache proper: a row written there is not counted.
    """
    batch = [names.BATCH]
    advanced = builder.op("Add", [write_index, num_stored], "advanced", np.int64, batch)
    capacity = builder.op("Shape", [past_key], "capacity", np.int64, [1], start=2, end=3)
    spare = builder.op("Sub", [capacity, builder.ints(1)], "spare_row", np.int64, [1])
    return builder.op("Min", [advanced, spare], "next_write_index", np.int64, batch)


def _insert(
    graph: gs.Graph, layer: DecoderLayer, write_index: gs.Variable, lengths: gs.Variable
) -> None:
    builder = GraphBuilder(graph, f"layers.{layer.index}/kv_cache")
    old = layer.attention
    query, key, value = old.inputs[:3]
    num_kv_heads = int(old.attrs["kv_num_heads"])
    head_dim = int(key.shape[-1]) // num_kv_heads
    shape: Shape = [names.BATCH, num_kv_heads, names.capacity(names.FULL), head_dim]
    past = [
        builder.graph_input(names.past(layer.index, part), key.dtype, shape)
        for part in ("key", "value")
    ]
    output, *present = builder.multi_op(
        "KVCacheAttention",
        [query, key, value, *past, write_index, lengths],
        [
            ("output", old.outputs[0].dtype, old.outputs[0].shape),
            ("present_key", key.dtype, shape),
            ("present_value", key.dtype, shape),
        ],
        domain=names.DOMAIN,
        num_heads=int(old.attrs["q_num_heads"]),
        kv_num_heads=num_kv_heads,
        scale=float(old.attrs.get("scale") or head_dim**-0.5),
    )
    for part, tensor in zip(("key", "value"), present, strict=True):
        builder.graph_output(tensor, names.present(layer.index, part))
    replace_uses(old.outputs[0], output)
    old.outputs.clear()
