"""Let a decoder graph put out what it computes inside: hidden states, scores, margins.

Values are found through the passes' own search for decoder layers and selections, never by
the names of a particular exporter.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs


__all__ = ["MarkedModel", "mark_decoder"]

_PREDICTOR_OUT = (9, 10)  # last weight and bias among PredictorHead's inputs


@dataclasses.dataclass(frozen=True)
class MarkedModel:
    """A decoder with further outputs.

    Attributes:
        model: Its weights are external, as they were.
        hidden_states: Layer → output name; [batch, rows, hidden_size] behind that layer.
        image_scores: Output name; [batch, rows] float32, higher is kept.
        keep_margin: Output name; [batch, 1] float32, positive where the token is kept.
        text_indices: Output name; [batch, rows] int64, which of the rows that the image
            selection left the second selection of recompute leaves.
    """

    model: onnx.ModelProto
    hidden_states: dict[int, str]
    image_scores: str | None
    keep_margin: str | None
    text_indices: str | None

    @property
    def marked(self) -> set[str]:
        """Names of all further outputs."""
        found = (self.image_scores, self.keep_margin, self.text_indices)
        return {*self.hidden_states.values(), *(name for name in found if name is not None)}


def mark_decoder(model: onnx.ModelProto, *, layers: bool, lowered: bool) -> MarkedModel:
    """Add outputs to a portable decoder.

    Args:
        model: With or without a KV cache, sparse or dense; its weights are external.
        layers: Put out the hidden states of every layer too.
        lowered: Bring the graph into ONNX Runtime's own form, as the product runs it.

    Raises:
        PreconditionError: If decoder layers are not found.
    """
    from dllava_export.passes.base import run_passes
    from dllava_export.passes.decoder_layers import find_decoder_layers
    from dllava_export.passes.graph_io import graph_from_model, model_from_graph
    from dllava_export.passes.insert_image_selection import find_image_selection
    from dllava_export.pipeline import lowering_passes

    graph = graph_from_model(model)
    hidden = {}
    if layers:
        for layer in find_decoder_layers(graph):
            hidden[layer.index] = _put_out(graph, layer.hidden_out)
    selection = find_image_selection(graph)
    scores = margin = indices = None
    if selection is not None:
        (select,) = selection.kept_indices.inputs
        scores = _put_out(graph, select.inputs[0])
        indices = _text_indices(graph)
        margin = _keep_margin(graph)
    if lowered:
        run_passes(graph, lowering_passes())
    graph.toposort()
    return MarkedModel(model_from_graph(graph), hidden, scores, margin, indices)


def _put_out(graph: gs.Graph, tensor: gs.Variable) -> str:
    if not any(tensor is entry for entry in graph.outputs):
        graph.outputs.append(tensor)
    return tensor.name


def _text_indices(graph: gs.Graph) -> str | None:
    for node in graph.nodes:
        if node.op == "SelectTokens" and "/select_text/" in node.name:
            return _put_out(graph, node.outputs[0])
    return None


def _keep_margin(graph: gs.Graph) -> str | None:
    """Put out how far the keep bit is from changing; None where there is no keep bit."""
    for node in graph.nodes:
        if "/keep_bit/" not in node.name:
            continue
        if node.op == "PredictorHead":
            return _put_out(graph, _logit_difference(graph, node))
        if node.op == "Greater":
            return _put_out(graph, node.inputs[0])
    return None


def _logit_difference(graph: gs.Graph, head: gs.Node) -> gs.Variable:
    """Return logit of keep less logit of drop, which PredictorHead does not put out.

    A second head whose last layer has its two rows exchanged scores the drop.
    """
    from dllava_export.passes.graph_builder import GraphBuilder

    builder = GraphBuilder(graph, "validation/keep_margin")
    inputs = list(head.inputs)
    for index in _PREDICTOR_OUT:
        tensor = inputs[index]
        inputs[index] = builder.op(
            "Gather", [tensor, builder.ints(1, 0)], f"exchanged_{index}", tensor.dtype,
            tensor.shape, axis=0,
        )  # fmt: skip
    shape = head.outputs[0].shape
    drop, _ = builder.multi_op(
        "PredictorHead",
        inputs,
        [("drop_scores", np.float32, shape), ("is_dropped", bool, shape)],
        domain=names.DOMAIN,
        epsilon=head.attrs["epsilon"],
    )
    return builder.op("Sub", [head.outputs[0], drop], "margin", np.float32, shape)
