"""Where in the model a node of a graph is: `decoder layer 3, attention`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dllava_export.errors import PreconditionError

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs


__all__ = ["NodePlaces"]

_SCOPES = {
    "select_image": "image selection",
    "select_text": "output text selection",
    "keep_bit": "keep bit",
}
_LOWERED_PREFIX = "tensorrt/"
_MIN_NAME_LENGTH = 4  # shorter node names occur in any message by chance


class NodePlaces:
    """Names of nodes, and the places they have in one graph.

    Args:
        model: The portable graph, before it is lowered.
        what: What the graph is, for nodes outside decoder layers, for example `decoder`.
    """

    def __init__(self, model: onnx.ModelProto, what: str) -> None:
        from dllava_export.passes.graph_io import graph_from_model

        self._what = what
        graph = graph_from_model(model)
        self._places = _layer_places(graph)
        self._names = {node.name for node in graph.nodes}

    def place(self, node_name: str) -> str:
        """Return where a node is, by its name in the portable or in the lowered graph."""
        original = self._original(node_name)
        scope = re.search(r"layers\.(\d+)/(\w+)/", f"{original}/")
        if scope is not None and scope[2] in _SCOPES:
            return f"{_SCOPES[scope[2]]} before decoder layer {scope[1]}"
        return self._places.get(original, f"{self._what}, outside its layers")

    def find(self, text: str) -> str | None:
        """Return the longest node name that a message of TensorRT mentions, or None."""
        words = set(re.findall(r"[\w./]+", text.replace(_LOWERED_PREFIX, "")))
        parts = {word.rstrip(".") for word in words}
        parts |= {
            "/".join(p.split("/")[:n]) for p in parts for n in range(2, p.count("/") + 1)
        }
        found = [name for name in parts & self._names if len(name) >= _MIN_NAME_LENGTH]
        return max(found, key=len, default=None)

    def _original(self, node_name: str) -> str:
        """Return the node of the portable graph that a lowered one stands for."""
        if not node_name.startswith(_LOWERED_PREFIX):
            return node_name
        name = node_name.removeprefix(_LOWERED_PREFIX)
        while name not in self._names and "/" in name:
            name = name.rsplit("/", 1)[0]
        return name


def _layer_places(graph: gs.Graph) -> dict[str, str]:
    """Return node name → place for the nodes of decoder layers; empty for other graphs."""
    from dllava_export.passes.decoder_layers import find_decoder_layers
    from dllava_export.passes.patterns import descendants

    try:
        layers = find_decoder_layers(graph)
    except PreconditionError:
        return {}
    places: dict[str, str] = {}
    for layer in layers:
        halves = (
            ("attention", layer.hidden_in, layer.hidden_mid),
            ("MLP", layer.hidden_mid, layer.hidden_out),
        )
        for half, start, end in halves:
            after = {id(node) for node in descendants(start)}
            for node in _ancestors(end.inputs[0], within=after):
                places[node.name] = f"decoder layer {layer.index}, {half}"
    for node in descendants(layers[-1].hidden_out):
        places.setdefault(node.name, "language model head")
    return places


def _ancestors(node: gs.Node, within: set[int]) -> Iterable[gs.Node]:
    """Return a node and all nodes before it that are in a set of ids."""
    seen: dict[int, gs.Node] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if id(current) in seen or id(current) not in within:
            continue
        seen[id(current)] = current
        stack += [tensor.inputs[0] for tensor in current.inputs if tensor.inputs]
    return seen.values()
