"""Compute logits for the last valid row of each sample only.

Before:  last layer ► norm ► lm_head ► logits [batch, rows, vocab_size]
After:   last layer ► GatherLastToken(row_lengths) ► norm ► lm_head ► Squeeze ► logits
         [batch, vocab_size]

Adds the input `token_kind`, whose non-zero rows are counted as `row_lengths` [batch].

Requires  decoder layers; one output, the logits.
Ensures   `logits` is two-dimensional.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.decoder_layers import find_decoder_layers, find_final_logits
from dllava_export.passes.graph_builder import GraphBuilder, find_input, replace_uses
from dllava_export.passes.patterns import descendants
from dllava_export.passes.row_selection import set_num_rows

__all__ = ["GatherLastRowPass", "row_lengths"]

_ROW_LENGTHS = "rows/row_lengths"


@dataclasses.dataclass(frozen=True)
class GatherLastRowPass(Pass):
    """Gather each sample's last valid row before the final norm."""

    def requires(self, graph: gs.Graph) -> None:
        """Layers and logits must be found."""
        if find_input(graph, names.TOKEN_KIND) is None:
            find_final_logits(graph, find_decoder_layers(graph)[-1])

    def apply(self, graph: gs.Graph) -> bool:
        """Insert the gather and squeeze the logits."""
        if find_input(graph, names.TOKEN_KIND) is not None:
            return False
        last = find_decoder_layers(graph)[-1]
        logits = find_final_logits(graph, last)
        hidden = last.hidden_out
        readers = list(hidden.outputs)
        builder = GraphBuilder(graph, "last_row")
        lengths = _insert_row_lengths(graph)
        gathered = builder.op(
            "GatherLastToken",
            [hidden, lengths],
            "hidden_states",
            hidden.dtype,
            [names.BATCH, 1, hidden.shape[-1]],
            domain=names.DOMAIN,
        )
        replace_uses(hidden, gathered, readers)
        graph.outputs.remove(logits)
        vocab_size = logits.shape[-1]
        logits.name, logits.shape = "last_row/logits", [names.BATCH, 1, vocab_size]
        set_num_rows(descendants(gathered), hidden.shape[1], 1)
        squeezed = builder.op(
            "Squeeze",
            [logits, builder.ints(1)],
            "row",
            logits.dtype,
            [names.BATCH, vocab_size],
        )
        graph.outputs.insert(0, squeezed)
        squeezed.name = names.LOGITS
        return True

    def ensures(self, graph: gs.Graph) -> None:
        """The logits must have lost their row axis."""
        logits = graph.outputs[0]
        if logits.name != names.LOGITS or len(logits.shape) != 2:
            raise PostconditionError(
                f"The first output is {logits.name!r} of shape {logits.shape}, expected "
                f"{names.LOGITS!r} [batch, vocab_size]."
            )


def row_lengths(graph: gs.Graph) -> gs.Variable:
    """Return the [batch] int64 count of valid rows that this pass put into the graph."""
    return graph.tensors()[_ROW_LENGTHS]


def _insert_row_lengths(graph: gs.Graph) -> gs.Variable:
    builder = GraphBuilder(graph, "rows")
    rows = [names.BATCH, names.ROWS]
    token_kind = builder.graph_input(names.TOKEN_KIND, np.int64, rows)
    padding = builder.scalar(names.PADDING, np.int64)
    is_padding = builder.op("Equal", [token_kind, padding], "is_padding", bool, rows)
    is_valid = builder.op("Not", [is_padding], "is_valid", bool, rows)
    counted = builder.op("Cast", [is_valid], "counted", np.int64, rows, to=7)
    return builder.op(
        "ReduceSum",
        [counted, builder.ints(1)],
        "row_lengths",
        np.int64,
        [names.BATCH],
        keepdims=0,
    )
