"""Policy `fastv`: what the last row of the prompt looks at stays.

    score of row j = paid[last row of the prompt, j]

where paid is the attention of the layer before `sparse_layer` (`paid_attention.py`). As
published: one row, which is about to give the first token, judges all others. Its answer may
need more than the first token's look; policy `attention` asks all text behind the image.

Source    FastV (arXiv:2403.06764), with K = `sparse_layer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.passes.policies.base import ImageArrays, ImageRows, Policy
from dllava_export.passes.policies.paid_attention import (
    last_prompt_row,
    paid_attention,
    paid_attention_arrays,
    row_numbers,
)
from dllava_export.passes.policies.scores import F32

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.geometry import Geometry
    from dllava_export.passes.graph_builder import GraphBuilder
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["FastVPolicy"]


class FastVPolicy(Policy):
    """Ranks image rows by the attention that the prompt's last row pays to them."""

    name = "fastv"
    help = "attention that the prompt's last row pays"
    image_tokens = "attention that the prompt's last row pays"
    score_meaning = "attention of the last row"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Return what the last row pays, [batch, rows] float32."""
        row = row_numbers(builder, rows.token_kind)
        last = last_prompt_row(builder, rows.token_kind, row)
        paid, _ = paid_attention(builder, rows.attention, row, last)
        shape = list(rows.token_kind.shape)
        return builder.op("Squeeze", [paid, builder.ints(1)], "scores", F32, shape)

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return what the last row pays, [n] float32."""
        kinds = rows.attention.token_kind
        is_prompt = np.isin(kinds, (names.PROMPT_TEXT, names.IMAGE))
        (paid,) = paid_attention_arrays(rows.attention, np.flatnonzero(is_prompt)[-1:])
        return paid[kinds == names.IMAGE].astype(F32)

    def image_flops(self, geometry: Geometry) -> int:
        """Count the product of one query with the keys of the image rows."""
        return 2 * geometry.num_image_tokens * geometry.num_heads * geometry.head_dim
