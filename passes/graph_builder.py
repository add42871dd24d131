"""Adds nodes to a graph so that every new value has a scoped name, a dtype and a shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from dllava_export import names

__all__ = [
    "GraphBuilder",
    "Shape",
    "find_input",
    "find_output",
    "replace_uses",
    "replace_value",
]

Shape = Sequence[int | str | None]
DType = npt.DTypeLike | int
"""Or ONNX's number of a type that NumPy lacks."""


class GraphBuilder:
    """Appends nodes under one scope, for example `layers.2/image_predictor`."""

    def __init__(self, graph: gs.Graph, scope: str) -> None:
        self.graph = graph
        self.scope = scope
        self._taken = set(graph.tensors())

    def scoped(self, scope: str) -> GraphBuilder:
        """Return a builder one scope further down."""
        return GraphBuilder(self.graph, f"{self.scope}/{scope}")

    def _name(self, what: str) -> str:
        name, number = f"{self.scope}/{what}", 1
        while name in self._taken:
            number += 1
            name = f"{self.scope}/{what}_{number}"
        self._taken.add(name)
        return name

    def constant(self, what: str, values: npt.ArrayLike, dtype: npt.DTypeLike) -> gs.Constant:
        """Add a constant held in the graph itself."""
        return gs.Constant(self._name(what), np.asarray(values, dtype=dtype))

    def ints(self, *values: int) -> gs.Constant:
        """Add a 1-D int64 constant, as shapes and axes are given."""
        return self.constant("ints_" + "_".join(str(v) for v in values), values, np.int64)

    def scalar(self, value: float | bool, dtype: npt.DTypeLike) -> gs.Constant:
        """Add a 0-D constant."""
        return self.constant(f"scalar_{value}", value, dtype)

    def op(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        what: str,
        dtype: DType,
        shape: Shape | None,
        *,
        domain: str | None = None,
        **attrs: object,
    ) -> gs.Variable:
        """Add a node with one output and return that output; shape None where it is unknown."""
        return self.multi_op(op, inputs, [(what, dtype, shape)], domain=domain, **attrs)[0]

    def multi_op(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        outputs: Sequence[tuple[str, DType, Shape | None]],
        *,
        domain: str | None = None,
        **attrs: object,
    ) -> list[gs.Variable]:
        """Add a node with several outputs, each given as (what, dtype, shape)."""
        results = [
            gs.Variable(
                self._name(what),
                dtype=_element_type(dtype),
                shape=None if shape is None else list(shape),
            )
            for what, dtype, shape in outputs
        ]
        if domain == names.DOMAIN:
            attrs["plugin_namespace"] = names.PLUGIN_NAMESPACE
            attrs["plugin_version"] = names.PLUGIN_VERSION
        self.graph.nodes.append(
            gs.Node(
                op=op,
                name=results[0].name,
                attrs=attrs,
                inputs=list(inputs),
                outputs=results,
                domain=domain,
            )
        )
        return results

    def graph_input(self, name: str, dtype: DType, shape: Shape) -> gs.Variable:
        """Return the graph input of that name, adding it where it is missing."""
        found = find_input(self.graph, name)
        if found is None:
            found = gs.Variable(name, dtype=_element_type(dtype), shape=list(shape))
            self.graph.inputs.append(found)
        return found

    def graph_output(self, value: gs.Variable, name: str) -> None:
        """Make a value a graph output under a public name."""
        value.name = name
        self.graph.outputs.append(value)


def _element_type(dtype: DType) -> np.dtype | int:
    """Return a dtype as graphsurgeon has it: ONNX's own number where NumPy knows no such type."""
    return dtype if isinstance(dtype, int) else np.dtype(dtype)


def find_input(graph: gs.Graph, name: str) -> gs.Variable | None:
    """Return the graph input of that name, or None."""
    return next((tensor for tensor in graph.inputs if tensor.name == name), None)


def find_output(graph: gs.Graph, name: str) -> gs.Variable | None:
    """Return the graph output of that name, or None."""
    return next((tensor for tensor in graph.outputs if tensor.name == name), None)


def replace_value(graph: gs.Graph, old: gs.Variable, new: gs.Variable) -> None:
    """Let everything read `new` instead of `old`; a graph output keeps its name."""
    replace_uses(old, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.name, old.name = old.name, f"{old.name}/replaced"
            graph.outputs[index] = new


def replace_uses(
    old: gs.Tensor, new: gs.Tensor, nodes: Sequence[gs.Node] | None = None
) -> int:
    """Let consumers of `old`, or those among `nodes`, read `new`; return the count."""
    allowed = None if nodes is None else {id(node) for node in nodes}
    count = 0
    for node in list(old.outputs):
        if allowed is not None and id(node) not in allowed:
            continue
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
                count += 1
    return count
