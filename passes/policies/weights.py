"""Trained predictors, as policies that need them take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dllava_export.errors import PreconditionError

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

__all__ = ["PredictorWeights"]


@dataclasses.dataclass(frozen=True)
class PredictorWeights:
    """Trained predictors: weights by canonical name, and what shapes cannot tell.

    Attributes:
        tensors: `image_predictor.*` and `output_text_predictor.*`; arrays, or tensors that
            refer to external data.
        num_heads: Attention heads of the image predictor's blocks.
    """

    tensors: Mapping[str, onnx.TensorProto | np.ndarray]
    num_heads: int = 8

    def constant(self, name: str) -> gs.Constant:
        """Return a weight as a constant of its own name.

        Raises:
            PreconditionError: If the weight is not there.
        """
        import onnx_graphsurgeon as gs
        from onnx_graphsurgeon.ir.tensor import LazyValues

        value = self._find(name)
        if isinstance(value, np.ndarray):
            return gs.Constant(name, value)
        return gs.Constant(name, LazyValues(value))

    def array(self, name: str) -> np.ndarray:
        """Return a weight that is an array, in float64.

        Raises:
            PreconditionError: If the weight is not there.
        """
        return np.asarray(self._find(name), np.float64)

    def count_blocks(self) -> int:
        """Return the number of transformer blocks of the image predictor."""
        prefix = "image_predictor.transformer."
        blocks = {n[len(prefix) :].split(".")[0] for n in self.tensors if n.startswith(prefix)}
        return len(blocks)

    def _find(self, name: str) -> onnx.TensorProto | np.ndarray:
        if name not in self.tensors:
            prefix = name.split(".", 1)[0]
            raise PreconditionError(
                f"The checkpoint has no {prefix} ({name!r} is missing), which the policy "
                "needs. Use a trained Dynamic-LLaVA checkpoint, or a policy "
                "that needs no training; `dllava-export export --help` lists them."
            )
        return self.tensors[name]
