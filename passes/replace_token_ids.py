"""Feed the decoder with embeddings instead of token ids.

Before:  input_ids ► Gather(embedding table) ► layer 0
After:   inputs_embeds ► layer 0

Image features are put in place by the runtime, which therefore looks tokens up itself. The
name of the table is returned by `token_embedding`, before the pass takes it out.

Requires  an `inputs_embeds` input, or `input_ids` that only a Gather of a weight reads.
Ensures   the graph has `inputs_embeds` and no `input_ids`.
A graph that takes embeddings already is left alone.
"""

from __future__ import annotations

import dataclasses

import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import find_input, replace_uses

__all__ = ["ReplaceTokenIdsPass", "token_embedding"]

_INPUT_IDS = "input_ids"


@dataclasses.dataclass(frozen=True)
class ReplaceTokenIdsPass(Pass):
    """Replace the token embedding by the graph input `inputs_embeds`."""

    def requires(self, graph: gs.Graph) -> None:
        """The embedding must be found, or be outside already; positions must be an input."""
        if find_input(graph, names.INPUTS_EMBEDS) is None:
            _embedding_gather(graph)
        if find_input(graph, names.POSITION_IDS) is None:
            raise PreconditionError(
                f"The decoder has no input {names.POSITION_IDS!r}; found "
                f"{[t.name for t in graph.inputs]}. A sparse decoder's positions are not a "
                "range: export with position ids as an input."
            )

    def apply(self, graph: gs.Graph) -> bool:
        """Replace the embedding's output by a graph input."""
        if find_input(graph, names.INPUTS_EMBEDS) is not None:
            return False
        gather = _embedding_gather(graph)
        table, embedded = gather.inputs[0], gather.outputs[0]
        inputs_embeds = gs.Variable(
            names.INPUTS_EMBEDS,
            dtype=embedded.dtype or table.dtype,
            shape=[names.BATCH, names.ROWS, int(table.shape[1])],
        )
        input_ids = find_input(graph, _INPUT_IDS)
        assert input_ids is not None  # required above
        replace_uses(embedded, inputs_embeds)
        for node in list(input_ids.outputs):  # readers of its shape
            if node.op == "Shape":
                replace_uses(input_ids, inputs_embeds, [node])
                _keep_to_two_axes(node)
        graph.inputs[graph.inputs.index(input_ids)] = inputs_embeds
        return True

    def ensures(self, graph: gs.Graph) -> None:
        """Token ids must be gone."""
        input_ids = find_input(graph, _INPUT_IDS)
        if find_input(graph, names.INPUTS_EMBEDS) is None or input_ids is not None:
            raise PostconditionError(
                "input_ids is still read after the embedding was replaced."
            )


def _keep_to_two_axes(shape: gs.Node) -> None:
    """Let a Shape node that read [batch, rows] ignore the third axis of embeddings."""
    for limit, default in (("start", 0), ("end", 2)):
        value = int(shape.attrs.get(limit, default))
        shape.attrs[limit] = value + 2 if value < 0 else value


def token_embedding(graph: gs.Graph) -> gs.Constant | None:
    """Return the embedding table inside a graph, [vocab_size, hidden_size], or None."""
    if find_input(graph, names.INPUTS_EMBEDS) is not None:
        return None
    return _embedding_gather(graph).inputs[0]


def _embedding_gather(graph: gs.Graph) -> gs.Node:
    input_ids = find_input(graph, _INPUT_IDS)
    readers = list(input_ids.outputs) if input_ids is not None else []
    gathers = [n for n in readers if n.op == "Gather" and isinstance(n.inputs[0], gs.Constant)]
    others = [n for n in readers if n.op != "Shape" and not any(n is g for g in gathers)]
    if len(gathers) != 1 or others:
        raise PreconditionError(
            f"The decoder has neither the input {names.INPUTS_EMBEDS!r} nor an input "
            f"{_INPUT_IDS!r} that one embedding Gather reads; found the inputs "
            f"{[t.name for t in graph.inputs]}. Export the language model alone."
        )
    return gathers[0]
