"""Recognise RMSNorm.

Before:  x ► (Cast) ► Pow 2 ► ReduceMean ► Add eps ► Sqrt ► Reciprocal ► Mul x ► (Cast) ► Mul w
After:   x ► RMSNormalization(w, epsilon)

Requires  nothing.
Ensures   no RMSNorm is left in its decomposed form, as far as this pass knows the form.
Absence is normal: a graph that already has RMSNormalization is left alone.
"""

from __future__ import annotations

import dataclasses

import onnx_graphsurgeon as gs

from dllava_export.errors import PostconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import GraphBuilder, replace_value
from dllava_export.passes.patterns import (
    constant_values,
    producer_of,
    scalar_value,
    unordered_inputs,
)

__all__ = ["FuseRMSNormPass"]


@dataclasses.dataclass(frozen=True)
class FuseRMSNormPass(Pass):
    """Replace decomposed RMSNorm by the ONNX op RMSNormalization (float32 inside)."""

    def apply(self, graph: gs.Graph) -> bool:
        """Replace every match; return True where there was one."""
        matches = [m for node in graph.nodes if (m := _match(node)) is not None]
        for number, match in enumerate(matches):
            builder = GraphBuilder(graph, f"rms_norm.{number}")
            normed = builder.op(
                "RMSNormalization",
                [match.x, match.weight],
                "normed",
                match.output.dtype,
                match.output.shape,
                axis=-1,
                epsilon=match.epsilon,
                stash_type=1,
            )
            replace_value(graph, match.output, normed)
        return bool(matches)

    def ensures(self, graph: gs.Graph) -> None:
        """No match may be left."""
        for node in graph.nodes:
            if _match(node) is not None:
                raise PostconditionError(f"The RMSNorm at {node.name!r} was left.")


@dataclasses.dataclass(frozen=True)
class _Match:
    x: gs.Tensor
    weight: gs.Constant
    epsilon: float
    output: gs.Variable


def _match(node: gs.Node) -> _Match | None:
    """Match from the last Mul, the one with the weight."""
    if node.op != "Mul" or len(node.inputs) != 2:
        return None
    for weight, scaled in unordered_inputs(node):
        if not (isinstance(weight, gs.Constant) and len(weight.shape) == 1):
            continue
        found = _match_scaled(_skip_cast(scaled))
        if found is not None:
            x, epsilon = found
            return _Match(x, weight, epsilon, node.outputs[0])
    return None


def _match_scaled(tensor: gs.Tensor) -> tuple[gs.Tensor, float] | None:
    """Match x * rsqrt(mean(x^2) + eps) or x / sqrt(...); return (x, eps)."""
    multiply = producer_of(tensor, "Mul")
    if multiply is not None:
        for x, factor in unordered_inputs(multiply):
            reciprocal = producer_of(factor, "Reciprocal", "Div")
            if reciprocal is None:
                continue
            if reciprocal.op == "Div" and scalar_value(reciprocal.inputs[0]) != 1:
                continue
            epsilon = _match_root(reciprocal.inputs[-1], x)
            if epsilon is not None:
                return _skip_cast(x), epsilon
    divide = producer_of(tensor, "Div")
    if divide is not None:
        x, root = divide.inputs
        epsilon = _match_root(root, x)
        if epsilon is not None:
            return _skip_cast(x), epsilon
    return None


def _match_root(root: gs.Tensor, x: gs.Tensor) -> float | None:
    """Match sqrt(mean(x^2, last axis) + eps); return eps."""
    sqrt = producer_of(root, "Sqrt")
    add = producer_of(sqrt.inputs[0], "Add") if sqrt is not None else None
    if add is None:
        return None
    for mean_value, epsilon in unordered_inputs(add):
        mean = producer_of(mean_value, "ReduceMean")
        value = scalar_value(epsilon)
        if mean is not None and value is not None and _is_last_axis(mean):
            return value if _is_square_of(mean.inputs[0], x) else None
    return None


def _is_last_axis(mean: gs.Node) -> bool:
    axes = constant_values(mean.inputs[1]) if len(mean.inputs) > 1 else mean.attrs.get("axes")
    rank = len(mean.inputs[0].shape or ())
    return (
        axes is not None and list(axes) in ([-1], [rank - 1]) and mean.attrs.get("keepdims", 1)
    )


def _is_square_of(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    power = producer_of(tensor, "Pow")
    if power is not None:
        return power.inputs[0] is x and scalar_value(power.inputs[1]) == 2
    square = producer_of(tensor, "Mul")
    return square is not None and square.inputs[0] is x and square.inputs[1] is x


def _skip_cast(tensor: gs.Tensor) -> gs.Tensor:
    cast = producer_of(tensor, "Cast")
    return cast.inputs[0] if cast is not None else tensor
