"""Let a decoder go on from one layer with fewer rows: what every selection has in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PreconditionError
from dllava_export.passes.graph_builder import GraphBuilder, replace_uses
from dllava_export.passes.patterns import descendants

__all__ = [
    "RowRegion",
    "insert_row_selection",
    "insert_select_tokens",
    "region_from",
    "set_num_rows",
]


@dataclasses.dataclass(frozen=True)
class RowRegion:
    """The part of a graph that depends on one hidden state, and what enters it from outside.

    Attributes:
        hidden_states: [batch, rows, hidden_size], where the region starts.
        nodes: Every node that depends on it.
        entering: Other values the region reads that depend on the graph's inputs.
    """

    hidden_states: gs.Variable
    nodes: tuple[gs.Node, ...]
    entering: tuple[gs.Variable, ...]


def region_from(graph: gs.Graph, hidden_states: gs.Variable) -> RowRegion:
    """Return the region that depends on a hidden state."""
    nodes = descendants(hidden_states)
    from_inputs = {
        id(t) for entry in graph.inputs for node in descendants(entry) for t in node.outputs
    } | {id(entry) for entry in graph.inputs}
    inside = {id(t) for node in nodes for t in node.outputs} | {id(hidden_states)}
    entering = {
        id(t): t
        for node in nodes
        for t in node.inputs
        if id(t) in from_inputs and id(t) not in inside
    }
    return RowRegion(hidden_states, tuple(nodes), tuple(entering.values()))


def insert_row_selection(
    builder: GraphBuilder,
    region: RowRegion,
    kept_indices: gs.Variable,
    replacements: dict[str, gs.Variable],
) -> gs.Variable:
    """Gather every row-wise value that enters a region; return the gathered hidden states.

    Args:
        builder: Where new nodes are named.
        region: Taken before any node of the selection was added.
        kept_indices: [batch, num_kept] int64.
        replacements: Per-sample values by name that the region must read in a new form.

    Raises:
        PreconditionError: If something enters the region that is neither row-wise nor known.
    """
    hidden = region.hidden_states
    num_rows = hidden.shape[1]
    for tensor in (hidden, *region.entering):
        if tensor.name in replacements:
            replace_uses(tensor, replacements[tensor.name], region.nodes)
        elif (
            tensor.shape is not None and len(tensor.shape) > 1 and tensor.shape[1] == num_rows
        ):
            kept = _gather(builder, tensor, kept_indices)
            replace_uses(tensor, kept, region.nodes)
            if tensor is hidden:
                kept_hidden = kept
        elif not names.is_past(tensor.name):
            raise PreconditionError(
                f"{tensor.name!r} of shape {tensor.shape} is read after the selection at "
                f"{hidden.name!r}, and is not known to follow the rows: expected axis 1 to be "
                f"{num_rows!r}. The layers must not depend on shapes or masks of the whole "
                "sequence; run the fusing passes first."
            )
    set_num_rows(region.nodes, num_rows, kept_indices.shape[1])
    return kept_hidden


def _gather(
    builder: GraphBuilder, tensor: gs.Tensor, kept_indices: gs.Variable
) -> gs.Variable:
    return builder.op(
        "GatherTokens",
        [tensor, kept_indices],
        f"kept_{tensor.name.rsplit('/', 1)[-1]}",
        tensor.dtype,
        [tensor.shape[0], kept_indices.shape[1], *tensor.shape[2:]],
        domain=names.DOMAIN,
    )


def set_num_rows(nodes: Iterable[gs.Node], old: int | str, new: int | str) -> None:
    """Note on what nodes put out that axis 1 has another number of rows from now on."""
    for node in nodes:
        for tensor in node.outputs:
            if tensor.shape is not None and len(tensor.shape) > 1 and tensor.shape[1] == old:
                tensor.shape = [tensor.shape[0], new, *tensor.shape[2:]]


def insert_select_tokens(
    builder: GraphBuilder,
    scores: gs.Variable,
    token_kind: gs.Tensor,
    num_kept: gs.Tensor,
    kept_lengths: gs.Tensor,
    num_kept_dim: str,
) -> gs.Variable:
    """Add a SelectTokens node; return its kept_indices [batch, num_kept] int64."""
    return builder.op(
        "SelectTokens",
        [scores, token_kind, num_kept, kept_lengths],
        "kept_indices",
        np.int64,
        [names.BATCH, num_kept_dim],
        domain=names.DOMAIN,
    )
