"""Policy `key-diff`: the keys least like the mean key stay.

    unit key u[i, h] = k[i, h] / |k[i, h]|;  anchor a[h] = mean over image rows i of u[i, h]
    score of row i = -mean over key heads h of cos(u[i, h], a[h])

with the keys of the layer before `sparse_layer`, rotated, as a cache holds them. It needs no
attention weights, and does not look at the question.

Source    KeyDiff (arXiv:2504.15364), there for rows of a cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.passes.policies.base import ImageArrays, ImageRows, Policy
from dllava_export.passes.policies.paid_attention import key_heads
from dllava_export.passes.policies.scores import F32, is_image_row, unit_arrays, unit_rows

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.passes.graph_builder import GraphBuilder
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["KeyDiffPolicy"]


class KeyDiffPolicy(Policy):
    """Ranks image rows by how little their keys resemble the mean key of the image rows."""

    name = "key-diff"
    help = "the keys least like their mean"
    image_tokens = "least cosine of the key to the mean key"
    score_meaning = "unlike the mean key"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Score all rows, of which image rows alone make the mean."""
        unit, _ = unit_rows(builder, key_heads(builder, rows.attention))
        batch, num_rows, heads, size = unit.shape
        is_image = is_image_row(builder, rows.token_kind)
        column = builder.op(
            "Unsqueeze",
            [is_image, builder.ints(2, 3)],
            "is_image_4d",
            bool,
            [batch, num_rows, 1, 1],
        )
        nothing = builder.scalar(0.0, F32)
        # Chosen, not multiplied by 0: what padding rows hold may be anything.
        counted = builder.op("Where", [column, unit, nothing], "image_unit", F32, unit.shape)
        shape = [batch, 1, heads, size]
        total = builder.op(
            "ReduceSum", [counted, builder.ints(1)], "sum", F32, shape, keepdims=1
        )
        anchor, _ = unit_rows(builder, total)  # the sum points where the mean does
        product = builder.op("Mul", [unit, anchor], "product", F32, unit.shape)
        cosine = builder.op(
            "ReduceSum", [product, builder.ints(-1)], "cosine", F32, unit.shape[:3], keepdims=0
        )
        shape = [batch, num_rows]
        mean = builder.op(
            "ReduceMean", [cosine, builder.ints(-1)], "mean_cosine", F32, shape, keepdims=0
        )
        return builder.op("Neg", [mean], "scores", F32, shape)

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return how unlike the mean keys are, [n] float32."""
        unit = unit_arrays(rows.attention.key[rows.attention.token_kind == names.IMAGE])
        cosine = (unit * unit_arrays(unit.mean(0))).sum(-1)
        return -cosine.mean(-1).astype(F32)
