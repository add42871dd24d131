"""Keep the best-scoring image rows from decoder layer `sparse_layer` on.

Before:  hidden_states [batch, rows, hidden_size] ───────────────────► layer sparse_layer
After:   hidden_states ► policy ► SelectTokens ► GatherTokens ───────► layer sparse_layer

Every row-wise value that the later layers read (hidden states, rotary tables) is gathered;
positions are never renumbered. Where the graph has a KV cache, the later layers get capacities
and a write index of their own, so that the rows they never see are never allocated.

Adds the inputs `num_kept`, `kept_lengths`, `write_index_sparse` (with a cache) and, for the
predictor, `num_image_rows`; the outputs `kept_indices` and `next_write_index_sparse`.

Requires  `token_kind` and `position_ids` inputs; more layers than `sparse_layer`.
Ensures   layers from `sparse_layer` on see `num_kept` rows, in their original order.
Source    Dynamic-LLaVA, image branch of the decoder's inference path.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.decoder_layers import find_decoder_layers
from dllava_export.passes.gather_last_row import row_lengths
from dllava_export.passes.graph_builder import GraphBuilder, find_input
from dllava_export.passes.insert_kv_cache import insert_next_write_index
from dllava_export.passes.patterns import producer
from dllava_export.passes.policies.base import AttentionRows, ImageRows
from dllava_export.passes.policies.registry import POLICIES
from dllava_export.passes.policies.scores import check_scores
from dllava_export.passes.policies.weights import PredictorWeights
from dllava_export.passes.row_selection import (
    insert_row_selection,
    insert_select_tokens,
    region_from,
)

__all__ = ["ImageSelection", "InsertImageSelectionPass", "find_image_selection"]


@dataclasses.dataclass(frozen=True)
class InsertImageSelectionPass(Pass):
    """Insert scoring, selection and gathers before layer `sparse_layer`.

    Attributes:
        policy: Name of what scores image rows; see `policies/registry.py`.
        sparse_layer: First decoder layer, 0-based, that sees only kept rows; at least 1.
        weights: Trained predictors, for policies that need them.
    """

    policy: str
    sparse_layer: int
    weights: PredictorWeights | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        POLICIES.get(self.policy)  # refuses names that are not known

    def requires(self, graph: gs.Graph) -> None:
        """Row kinds and positions must be inputs; the layer must exist."""
        for name in (names.TOKEN_KIND, names.POSITION_IDS):
            if find_input(graph, name) is None:
                raise PreconditionError(
                    f"The graph has no input {name!r}; found {[t.name for t in graph.inputs]}."
                )
        num_layers = len(find_decoder_layers(graph))
        if not 1 <= self.sparse_layer < num_layers:
            raise PreconditionError(
                f"sparse_layer must be in 1..{num_layers - 1} for this decoder of "
                f"{num_layers} layers, got {self.sparse_layer}."
            )
        present = find_image_selection(graph)
        if present is not None and present.scope != self._scope:
            raise PreconditionError(
                f"The decoder is already sparse ({present.scope}), and {self._scope} was "
                "asked for. Start from a dense decoder."
            )

    @property
    def _scope(self) -> str:
        return f"layers.{self.sparse_layer}/select_image/{self.policy}"

    def apply(self, graph: gs.Graph) -> bool:
        """Insert the selection; return False where it is there already."""
        if find_image_selection(graph) is not None:
            return False
        before, layer = find_decoder_layers(graph)[
            self.sparse_layer - 1 : self.sparse_layer + 1
        ]
        hidden = layer.hidden_in
        region = region_from(graph, hidden)
        builder = GraphBuilder(graph, self._scope)
        lengths = row_lengths(graph)
        num_kept = builder.graph_input(names.NUM_KEPT, np.int64, [1])
        kept_lengths = builder.graph_input(names.KEPT_LENGTHS, np.int64, [names.BATCH])
        token_kind = find_input(graph, names.TOKEN_KIND)
        rows = ImageRows(
            hidden_states=hidden,
            position_ids=find_input(graph, names.POSITION_IDS),
            token_kind=token_kind,
            row_lengths=lengths,
            kept_lengths=kept_lengths,
            attention=_attention_rows(before.attention),
        )
        scores = POLICIES.get(self.policy).score(builder, rows, self.weights)
        check_scores(self.policy, scores, hidden)
        kept = insert_select_tokens(
            builder, scores, token_kind, num_kept, kept_lengths, names.NUM_KEPT_DIM
        )
        replacements = {lengths.name: kept_lengths}
        if find_input(graph, names.write_index(names.FULL)) is not None:
            write_index = builder.graph_input(
                names.write_index(names.SPARSE), np.int64, [names.BATCH]
            )
            replacements[names.write_index(names.FULL)] = write_index
            self._split_capacity(graph)
        insert_row_selection(builder, region, kept, replacements)
        builder.graph_output(kept, names.KEPT_INDICES)
        if names.write_index(names.FULL) in replacements:
            past_key = find_input(graph, names.past(self.sparse_layer, "key"))
            next_index = insert_next_write_index(
                builder.scoped("kv_cache"), write_index, kept_lengths, past_key
            )
            builder.graph_output(next_index, names.next_write_index(names.SPARSE))
        return True

    def _split_capacity(self, graph: gs.Graph) -> None:
        for layer in find_decoder_layers(graph)[self.sparse_layer :]:
            node = layer.attention
            for tensor in (*node.inputs[3:5], *node.outputs[1:3]):
                tensor.shape = [
                    names.capacity(names.SPARSE) if d == names.capacity(names.FULL) else d
                    for d in tensor.shape
                ]

    def ensures(self, graph: gs.Graph) -> None:
        """Later layers must read gathered rows, and no later cache the full capacity."""
        layer = find_decoder_layers(graph)[self.sparse_layer]
        gather = producer(layer.hidden_in)
        if gather is None or gather.op != "GatherTokens":
            raise PostconditionError(
                f"Decoder layer {self.sparse_layer} does not read kept rows."
            )
        for later in find_decoder_layers(graph)[self.sparse_layer :]:
            inputs = {tensor.name for tensor in later.attention.inputs}
            if names.write_index(names.FULL) in inputs:
                raise PostconditionError(
                    f"Decoder layer {later.index} still writes its cache at the full index."
                )


def _attention_rows(node: gs.Node) -> AttentionRows:
    """Return what an Attention or a KVCacheAttention reads of the rows that are fed."""
    query, key = node.inputs[:2]
    num_heads = int(node.attrs.get("num_heads") or node.attrs["q_num_heads"])
    head_dim = int(query.shape[-1]) // num_heads
    return AttentionRows(
        query=query,
        key=key,
        num_heads=num_heads,
        num_kv_heads=int(node.attrs["kv_num_heads"]),
        scale=float(node.attrs.get("scale") or head_dim**-0.5),
    )


@dataclasses.dataclass(frozen=True)
class ImageSelection:
    """Where an image selection stands in a graph.

    Attributes:
        scope: Prefix of its node names.
        layer: The decoder layer it stands before.
        kept_indices: [batch, num_kept] int64.
    """

    scope: str
    layer: int
    kept_indices: gs.Variable


def find_image_selection(graph: gs.Graph) -> ImageSelection | None:
    """Return the image selection of a graph, None where the decoder is dense."""
    for node in graph.nodes:
        scope = node.name.rsplit("/", 1)[0]
        if node.op == "SelectTokens" and "/select_image/" in scope:
            layer = int(scope.split("/")[0].removeprefix("layers."))
            return ImageSelection(scope, layer, node.outputs[0])
    return None
