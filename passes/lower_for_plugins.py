"""Give ops the form in which TensorRT's plugins take them.

Before:  kept_indices = SelectTokens(scores, token_kind, num_kept, kept_lengths)
After:   slots = Unsqueeze(Range(0, num_kept, 1), 0)
         kept_indices = SelectTokens(scores, token_kind, slots, kept_lengths)
Before:  scores, keep = PredictorHead(hidden_states, ...), keep bool
After:   the same with keep int32, and a Cast to bool

A quick plugin knows the shapes of its inputs, not their values, so an extent must come as a
shape; and plugins have no bool tensors. Ops in this form have no body: their functions no
longer fit, and only the plugin computes them.

A `num_kept` that is computed from data is no extent to TensorRT. There the selection is as wide as
what it selects from: the first `kept_lengths[b]` entries are the same, and the rows behind them
are padding, which later layers ignore and no output shows.

Requires  nothing.
Ensures   ops with a plugin that needs another form have it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import GraphBuilder, replace_value

__all__ = ["LowerForPluginsPass"]

_SELECT, _PREDICTOR = "SelectTokens", "PredictorHead"
_TOKEN_KIND, _NUM_KEPT, _KEEP = 1, 2, 1
_BOOL = 9  # onnx.TensorProto.BOOL


@dataclasses.dataclass(frozen=True)
class LowerForPluginsPass(Pass):
    """Give ops the form in which plugins take them.

    Attributes:
        plugin_ops: Ops that a plugin computes; others are left alone.
    """

    plugin_ops: tuple[str, ...]

    def apply(self, graph: gs.Graph) -> bool:
        """Change every node that needs it; return True where there was one."""
        selections = [n for n in self._of(graph, _SELECT) if not _is_lowered(n)]
        predictors = [n for n in self._of(graph, _PREDICTOR) if not _is_lowered(n)]
        slots: dict[str, gs.Variable] = {}
        for node in selections:
            name = node.inputs[_NUM_KEPT].name
            if name not in slots:
                slots[name] = _slots(graph, node)
            node.inputs[_NUM_KEPT] = slots[name]
        for node in predictors:
            _cast_keep(graph, node)
        return bool(selections or predictors)

    def ensures(self, graph: gs.Graph) -> None:
        """Every op must have its form."""
        for node in (*self._of(graph, _SELECT), *self._of(graph, _PREDICTOR)):
            if not _is_lowered(node):
                raise PostconditionError(f"{node.name!r} is not in the plugin's form.")

    def _of(self, graph: gs.Graph, op: str) -> list[gs.Node]:
        if op not in self.plugin_ops:
            return []
        return [n for n in graph.nodes if n.op == op and n.domain == names.DOMAIN]


def _is_lowered(node: gs.Node) -> bool:
    if node.op == _SELECT:
        return len(node.inputs[_NUM_KEPT].shape) > 1
    return node.outputs[_KEEP].dtype == np.dtype(np.int32)


def _slots(graph: gs.Graph, selection: gs.Node) -> gs.Variable:
    """Return a tensor of shape [1, num_kept] int64."""
    builder = GraphBuilder(graph, f"plugins/{selection.name}")
    token_kind, width = selection.inputs[_TOKEN_KIND], selection.inputs[_NUM_KEPT]
    extent = selection.outputs[0].shape[1]
    if not any(width is entry for entry in graph.inputs):
        width = builder.op("Shape", [token_kind], "rows", np.int64, [1], start=1, end=2)
        extent = token_kind.shape[1]
    limit = builder.op("Squeeze", [width, builder.ints(0)], "limit", np.int64, [])
    zero, one = builder.scalar(0, np.int64), builder.scalar(1, np.int64)
    row = builder.op("Range", [zero, limit, one], "range", np.int64, [extent])
    return builder.op("Unsqueeze", [row, builder.ints(0)], "slots", np.int64, [1, extent])


def _cast_keep(graph: gs.Graph, node: gs.Node) -> None:
    builder = GraphBuilder(graph, f"plugins/{node.name}")
    keep = node.outputs[_KEEP]
    number = gs.Variable(f"{builder.scope}/keep_number", np.dtype(np.int32), keep.shape)
    node.outputs[_KEEP] = number
    cast = builder.op("Cast", [number], "keep", np.bool_, keep.shape, to=_BOOL)
    replace_value(graph, keep, cast)
