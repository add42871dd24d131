"""Sum the residual stream and normalise it in one op of ONNX Runtime's CPU provider.

Before:  Add(residual, branch) ► sum;  RMSNormalization(sum, weight) ► normed
After:   com.microsoft::SkipSimplifiedLayerNormalization(residual, branch, weight) ► normed, sum

Requires  nothing.
Ensures   no such pair is left.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export.errors import PostconditionError
from dllava_export.passes.base import Pass
from dllava_export.passes.patterns import producer_of

__all__ = ["FuseResidualNormPass"]

_RANK = 3  # the op takes [batch, rows, hidden_size]
_DEFAULT_EPSILON = 1e-5  # of RMSNormalization; that of the other op is smaller


@dataclasses.dataclass(frozen=True)
class FuseResidualNormPass(Pass):
    """Fuse every float32 RMSNorm with the sum that it normalises."""

    def apply(self, graph: gs.Graph) -> bool:
        """Fuse every match; return True where there was one."""
        is_modified = False
        for norm in graph.nodes:
            add = _match(norm)
            if add is None:  # or another norm of the same sum came first
                continue
            is_modified = True
            (total,) = add.outputs
            add.outputs.clear()
            norm.op, norm.domain = "SkipSimplifiedLayerNormalization", "com.microsoft"
            norm.inputs = [*add.inputs, norm.inputs[1]]
            # Between them are mean and deviation, which are for training.
            norm.outputs = [
                norm.outputs[0],
                gs.Variable.empty(),
                gs.Variable.empty(),
                total,
            ]
            norm.attrs = {"epsilon": norm.attrs.get("epsilon", _DEFAULT_EPSILON)}
        return is_modified

    def ensures(self, graph: gs.Graph) -> None:
        """No match may be left."""
        for node in graph.nodes:
            if _match(node) is not None:
                raise PostconditionError(f"The sum before {node.name!r} was not fused.")


def _match(node: gs.Node) -> gs.Node | None:
    """Return the sum that an RMSNormalization reads, where the fused op takes both."""
    if node.op != "RMSNormalization" or node.domain or node.attrs.get("axis", -1) != -1:
        return None
    add = producer_of(node.inputs[0], "Add")
    if add is None or node.inputs[0].dtype != np.float32:
        return None
    first, second = (tensor.shape for tensor in add.inputs)
    weight = node.inputs[1].shape
    # Nothing may be broadcast but the weight, over the last axis.
    is_plain = first is not None and len(first) == _RANK and first == second
    return add if is_plain and weight is not None and len(weight) == 1 else None
