"""Policy `norm`: the shortest hidden states stay.

    score of row i = -sqrt(sum over j of hidden_states[i, j]^2)

Which end says something depends on the model: where vision towers keep notes of their own in
patches of background, those are the long ones, and a model whose tower has none may turn it
round. It ranks an image's rows against each other and has nothing to compare a single
generated token with, so that all of those are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export.passes.policies.base import ImageArrays, ImageRows, Policy
from dllava_export.passes.policies.scores import F32

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.passes.graph_builder import GraphBuilder
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["NormPolicy"]


class NormPolicy(Policy):
    """Ranks image rows by the length of their hidden states, the shortest first."""

    name = "norm"
    help = "the shortest hidden states"
    image_tokens = "length of the hidden state, the shortest first"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Score all rows, image or not: in decode there is one, a length of none is refused."""
        shape = list(rows.hidden_states.shape)
        hidden = builder.op("Cast", [rows.hidden_states], "hidden_f32", F32, shape, to=1)
        length = builder.op(
            "ReduceL2", [hidden, builder.ints(-1)], "length", F32, shape[:2], keepdims=0
        )
        return builder.op("Neg", [length], "scores", F32, shape[:2])

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return -lengths, [n] float32."""
        return -np.linalg.norm(rows.hidden_states, axis=-1).astype(F32)
