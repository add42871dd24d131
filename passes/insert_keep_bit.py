"""Decide for each generated token whether its keys and values stay in the sparse caches.

Before:  next_write_index_sparse = min(write_index_sparse + kept_lengths, capacity - 1)
After:   a generated token that the policy drops adds 0 instead of its length

The token is always written at `write_index_sparse` and sees itself; a dropped one is simply
overwritten by the next. Prompt rows are always stored. Adds the output `keep` [batch] bool.

Requires  an image selection and a KV cache.
Ensures   `next_write_index_sparse` depends on `keep`.
Source    Dynamic-LLaVA, output-text branch with KV cache.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.decoder_layers import find_decoder_layers
from dllava_export.passes.graph_builder import GraphBuilder, Shape, find_input, find_output
from dllava_export.passes.insert_image_selection import find_image_selection
from dllava_export.passes.patterns import descendants, producer
from dllava_export.passes.policies.base import TextRows
from dllava_export.passes.policies.registry import POLICIES, check_text_policy
from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["InsertKeepBitPass"]


@dataclasses.dataclass(frozen=True)
class InsertKeepBitPass(Pass):
    """Insert the keep bit and let the sparse write index depend on it.

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
        """The sparse cache group must exist."""
        if find_input(graph, names.write_index(names.SPARSE)) is None:
            raise PreconditionError(
                f"The graph has no input {names.write_index(names.SPARSE)!r}: insert the KV cache "
                "and the image selection first."
            )

    def apply(self, graph: gs.Graph) -> bool:
        """Insert the decision; return False where `keep` is an output already."""
        if find_output(graph, names.KEEP) is not None:
            return False
        selection = find_image_selection(graph)
        assert selection is not None  # it added the input that `requires` looked for
        layer = selection.layer
        hidden = find_decoder_layers(graph)[layer].hidden_in
        builder = GraphBuilder(graph, f"layers.{layer}/keep_bit/{self.policy}")
        keep, is_dropped = self._insert_decision(graph, builder, hidden)
        kept_lengths = find_input(graph, names.KEPT_LENGTHS)
        none = builder.scalar(0, np.int64)
        stored = builder.op(
            "Where", [is_dropped, none, kept_lengths], "num_stored", np.int64, [names.BATCH]
        )
        cap = producer(find_output(graph, names.next_write_index(names.SPARSE)))
        advance = producer(cap.inputs[0]) if cap is not None else None
        assert advance is not None  # as InsertImageSelectionPass made them
        advance.inputs = [stored if t is kept_lengths else t for t in advance.inputs]
        builder.graph_output(keep, names.KEEP)
        return True

    def _insert_decision(
        self, graph: gs.Graph, builder: GraphBuilder, hidden: gs.Variable
    ) -> tuple[gs.Variable, gs.Variable]:
        """Return keep and its opposite, [batch] bool; prompt rows are kept."""
        batch: Shape = [names.BATCH]
        column: Shape = [names.BATCH, 1]
        token_kind = find_input(graph, names.TOKEN_KIND)
        positions = find_input(graph, names.POSITION_IDS)
        # In decode there is one row; in prefill the result is not used, so any row will do.
        last = _last_row(builder, hidden, "hidden_states")
        last_position = _last_row(builder, positions, "position_ids")
        last_kind = _last_row(builder, token_kind, "token_kind")
        rows = TextRows(hidden_states=last, position_ids=last_position)
        policy = POLICIES.get(self.policy)
        _, decision = policy.keep_token(builder, rows, self.keep_rate, self.weights)
        generated = builder.scalar(names.GENERATED_TEXT, np.int64)
        is_generated = builder.op(
            "Equal", [last_kind, generated], "is_generated", bool, column
        )
        is_lost = builder.op("Not", [decision], "is_rejected", bool, column)
        dropped = builder.op("And", [is_generated, is_lost], "dropped", bool, column)
        is_dropped = builder.op(
            "Squeeze", [dropped, builder.ints(1)], "is_dropped", bool, batch
        )
        return builder.op("Not", [is_dropped], "is_kept", bool, batch), is_dropped

    def ensures(self, graph: gs.Graph) -> None:
        """The write index must depend on the decision."""
        keep = find_output(graph, names.KEEP)
        inverted = producer(keep) if keep is not None else None
        if inverted is None:
            raise PostconditionError(f"The graph has no output {names.KEEP!r}.")
        writer = producer(find_output(graph, names.next_write_index(names.SPARSE)))
        if not any(node is writer for node in descendants(inverted.inputs[0])):
            raise PostconditionError(
                f"{names.next_write_index(names.SPARSE)} ignores the keep bit."
            )


def _last_row(builder: GraphBuilder, tensor: gs.Variable, what: str) -> gs.Variable:
    shape = [tensor.shape[0], 1, *tensor.shape[2:]]
    limits = builder.ints(-1), builder.ints(np.iinfo(np.int64).max), builder.ints(1)
    return builder.op("Slice", [tensor, *limits], f"last_{what}", tensor.dtype, shape)
