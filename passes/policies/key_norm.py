"""Policy `key-norm`: the longest keys stay.

    score of row i = mean over key heads h of |k[i, h]|

with the keys of the layer before `sparse_layer`; their rotation does not change lengths. It
needs no attention weights, and does not look at the question.

Source    ViTCoP (2026), length of keys as importance where attention weights are not at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.passes.policies.base import ImageArrays, ImageRows, Policy
from dllava_export.passes.policies.paid_attention import key_heads
from dllava_export.passes.policies.scores import F32

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.passes.graph_builder import GraphBuilder
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["KeyNormPolicy"]


class KeyNormPolicy(Policy):
    """Ranks image rows by the length of their keys."""

    name = "key-norm"
    help = "the longest keys"
    image_tokens = "length of the key, the longest first"
    score_meaning = "length of the key"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Score all rows, image or not: in decode there is one, a length of none is refused."""
        key = key_heads(builder, rows.attention)
        shape, last = list(key.shape[:3]), builder.ints(-1)
        length = builder.op("ReduceL2", [key, last], "key_length", F32, shape, keepdims=0)
        return builder.op("ReduceMean", [length, last], "scores", F32, shape[:2], keepdims=0)

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return mean lengths, [n] float32."""
        key = rows.attention.key[rows.attention.token_kind == names.IMAGE]
        return np.linalg.norm(key.astype(np.float64), axis=-1).mean(-1).astype(F32)
