"""Without a KV cache: drop generated rows anew in every pass.

Before:  image selection ► layer sparse_layer
After:   image selection ► policy ► SelectTokens ► GatherTokens ► layer sparse_layer

The rows that compete are the generated ones except the last. As in the official code their
*number* is the count of positive decisions and the best-scoring ones survive, which is not
always the set of positive decisions. The count is per sample. Adds the output `num_rows`.

Requires  an image selection; no KV cache.
Ensures   layers from `sparse_layer` on see `num_rows` rows.
Source    Dynamic-LLaVA, output-text branch without KV cache.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.decoder_layers import find_decoder_layers
from dllava_export.passes.graph_builder import GraphBuilder, find_input, find_output
from dllava_export.passes.insert_image_selection import ImageSelection, find_image_selection
from dllava_export.passes.policies.base import TextRows
from dllava_export.passes.policies.registry import POLICIES, check_text_policy
from dllava_export.passes.policies.scores import check_scores
from dllava_export.passes.policies.weights import PredictorWeights
from dllava_export.passes.row_selection import (
    insert_row_selection,
    insert_select_tokens,
    region_from,
)

__all__ = ["InsertOutputTextSelectionPass"]

_NUM_KEPT_TEXT = "num_kept_rows"


@dataclasses.dataclass(frozen=True)
class InsertOutputTextSelectionPass(Pass):
    """Insert the second selection of the recompute graph, over generated rows.

    Attributes:
        policy: Name of what decides about generated tokens; see `policies/registry.py`.
        keep_rate: Share of generated tokens to keep, in (0, 1); a trained predictor has a
            threshold of its own.
        weights: Trained predictors, for policies that need them.
    """

    policy: str
    keep_rate: float
    weights: PredictorWeights | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_text_policy(self.policy, self.keep_rate)

    def requires(self, graph: gs.Graph) -> None:
        """The image selection must be there, and no cache."""
        if find_image_selection(graph) is None:
            raise PreconditionError("The graph has no image selection; insert it first.")
        if find_input(graph, names.write_index(names.FULL)) is not None:
            raise PreconditionError(
                "The graph has a KV cache; generated rows are dropped there by the keep bit."
            )

    def apply(self, graph: gs.Graph) -> bool:
        """Insert the selection; return False where it is there already."""
        if find_output(graph, names.NUM_ROWS) is not None:
            return False
        selection = find_image_selection(graph)
        assert selection is not None  # `requires` looked for it
        hidden = find_decoder_layers(graph)[selection.layer].hidden_in
        region = region_from(graph, hidden)
        builder = GraphBuilder(graph, f"layers.{selection.layer}/select_text/{self.policy}")
        kinds, is_candidate = _candidates(graph, builder, selection)
        positions = _gather(builder, find_input(graph, names.POSITION_IDS), selection)
        rows = TextRows(hidden_states=hidden, position_ids=positions)
        policy = POLICIES.get(self.policy)
        scores, keep = policy.keep_token(builder, rows, self.keep_rate, self.weights)
        check_scores(self.policy, scores, hidden)
        lengths = _kept_lengths(graph, builder, is_candidate, keep)
        longest = builder.op(
            "ReduceMax", [lengths, builder.ints(0)], "num_kept", np.int64, [1], keepdims=1
        )
        kept = insert_select_tokens(builder, scores, kinds, longest, lengths, _NUM_KEPT_TEXT)
        insert_row_selection(builder, region, kept, {names.KEPT_LENGTHS: lengths})
        builder.graph_output(lengths, names.NUM_ROWS)
        return True

    def ensures(self, graph: gs.Graph) -> None:
        """The number of rows must be reported."""
        if find_output(graph, names.NUM_ROWS) is None:
            raise PostconditionError(f"The graph has no output {names.NUM_ROWS!r}.")


def _gather(
    builder: GraphBuilder, tensor: gs.Variable, selection: ImageSelection
) -> gs.Variable:
    return builder.op(
        "GatherTokens",
        [tensor, selection.kept_indices],
        f"kept_{tensor.name}",
        tensor.dtype,
        list(selection.kept_indices.shape),
        domain=names.DOMAIN,
    )


def _candidates(
    graph: gs.Graph, builder: GraphBuilder, selection: ImageSelection
) -> tuple[gs.Variable, gs.Variable]:
    """Return row kinds for SelectTokens and which rows compete, both [batch, num_kept].

    Rows that compete take the kind `IMAGE`, the one that SelectTokens ranks.
    """
    shape = list(selection.kept_indices.shape)
    kinds = _gather(builder, find_input(graph, names.TOKEN_KIND), selection)
    one, zero = builder.scalar(1, np.int64), builder.scalar(0, np.int64)
    count = builder.op("Shape", [kinds], "count", np.int64, [1], start=1, end=2)
    scalar = builder.constant("scalar_shape", [], np.int64)
    limit = builder.op("Reshape", [count, scalar], "limit", np.int64, [])
    slots = builder.op("Range", [zero, limit, one], "slots", np.int64, [shape[1]])
    lengths = builder.op(
        "Unsqueeze",
        [find_input(graph, names.KEPT_LENGTHS), builder.ints(1)],
        "lengths",
        np.int64,
        [names.BATCH, 1],
    )
    last = builder.op("Sub", [lengths, one], "last", np.int64, [names.BATCH, 1])
    is_valid = builder.op("Less", [slots, lengths], "is_valid", bool, shape)
    is_before_last = builder.op("Less", [slots, last], "is_before_last", bool, shape)
    generated = builder.scalar(names.GENERATED_TEXT, np.int64)
    is_generated = builder.op("Equal", [kinds, generated], "is_generated", bool, shape)
    is_candidate = builder.op(
        "And", [is_generated, is_before_last], "is_candidate", bool, shape
    )
    padding = builder.scalar(names.PADDING, np.int64)
    text = builder.scalar(names.PROMPT_TEXT, np.int64)
    ranked = builder.scalar(names.IMAGE, np.int64)
    fixed = builder.op("Where", [is_valid, text, padding], "fixed_kind", np.int64, shape)
    return builder.op(
        "Where", [is_candidate, ranked, fixed], "kinds", np.int64, shape
    ), is_candidate


def _kept_lengths(
    graph: gs.Graph, builder: GraphBuilder, is_candidate: gs.Variable, keep: gs.Variable
) -> gs.Variable:
    """Return kept_lengths less the number of candidates decided against, [batch] int64."""
    shape, batch = list(is_candidate.shape), [names.BATCH]
    is_rejected = builder.op("Not", [keep], "is_rejected", bool, shape)
    dropped = builder.op("And", [is_candidate, is_rejected], "is_dropped", bool, shape)
    counted = builder.op("Cast", [dropped], "counted", np.int64, shape, to=7)
    num_dropped = builder.op(
        "ReduceSum", [counted, builder.ints(1)], "num_dropped", np.int64, batch, keepdims=0
    )
    kept_lengths = find_input(graph, names.KEPT_LENGTHS)
    return builder.op("Sub", [kept_lengths, num_dropped], "rows_left", np.int64, batch)
