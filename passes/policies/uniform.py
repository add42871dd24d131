"""Policy `uniform`: evenly spaced tokens stay.

    row i of n scores 1 where floor((i + 1) k / n) > floor(i k / n), else 0

which marks exactly k of n rows. Of image rows, i counts those of one sample; of generated
tokens i is the position and k / n the keep rate. A baseline without weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.passes.policies.base import (
    ImageArrays,
    ImageRows,
    Policy,
    TextArrays,
    TextRows,
)
from dllava_export.passes.policies.scores import F32, keep_above_zero

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.passes.graph_builder import GraphBuilder, Shape
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["UniformPolicy"]

# Rates in whole numbers: position times rate must be floored alike by all runtimes.
_FIXED_POINT = 1 << 20


class UniformPolicy(Policy):
    """Marks evenly spaced rows."""

    name = "uniform"
    help = "evenly spaced tokens"
    image_tokens = "evenly spaced"
    generated_tokens = "evenly spaced"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Mark, in each sample, as many image rows as its lengths say are kept."""
        shape = list(rows.token_kind.shape)
        column: Shape = [names.BATCH, 1]
        one, axis = builder.scalar(1, np.int64), builder.ints(1)
        image = builder.scalar(names.IMAGE, np.int64)
        is_image = builder.op("Equal", [rows.token_kind, image], "is_image", bool, shape)
        counted = builder.op("Cast", [is_image], "counted", np.int64, shape, to=7)
        total = builder.op(
            "ReduceSum", [counted, axis], "num_image", np.int64, column, keepdims=1
        )
        axis_1 = builder.scalar(1, np.int64)
        rank = builder.op(
            "CumSum", [counted, axis_1], "rank", np.int64, shape, exclusive=1, reverse=0
        )
        dropped = builder.op(
            "Sub",
            [rows.row_lengths, rows.kept_lengths],
            "num_dropped",
            np.int64,
            [names.BATCH],
        )
        dropped = builder.op("Unsqueeze", [dropped, axis], "dropped", np.int64, column)
        kept = builder.op("Sub", [total, dropped], "num_kept_image", np.int64, column)
        divisor = builder.op("Max", [total, one], "divisor", np.int64, column)
        return _evenly_spaced(builder, rank, kept, divisor)

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return 1 for marked rows and 0 for others, [n] float32."""
        total = len(rows.position_ids)
        return _marked(np.arange(total), rows.num_kept, total)

    def keep_token(
        self,
        builder: GraphBuilder,
        rows: TextRows,
        keep_rate: float,
        weights: PredictorWeights | None,
    ) -> tuple[gs.Variable, gs.Variable]:
        """Keep tokens at evenly spaced positions; their score is 1, that of others 0."""
        rate = builder.scalar(_fixed(keep_rate), np.int64)
        whole = builder.scalar(_FIXED_POINT, np.int64)
        scores = _evenly_spaced(builder, rows.position_ids, rate, whole)
        return scores, keep_above_zero(builder, scores)

    def reference_keep(
        self, rows: TextArrays, keep_rate: float, weights: PredictorWeights | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return marks twice: they are scores and margins."""
        marked = _marked(rows.position_ids, _fixed(keep_rate), _FIXED_POINT)
        return marked, marked


def _fixed(keep_rate: float) -> int:
    return round(keep_rate * _FIXED_POINT)


def _evenly_spaced(
    builder: GraphBuilder, index: gs.Tensor, kept: gs.Tensor, total: gs.Tensor
) -> gs.Variable:
    """Return 1.0 where floor((i + 1) kept / total) > floor(i kept / total), else 0.0."""
    shape = list(index.shape)
    one = builder.scalar(1, np.int64)
    following = builder.op("Add", [index, one], "following", np.int64, shape)
    parts = []
    for tensor, what in ((following, "up_to"), (index, "before")):
        product = builder.op("Mul", [tensor, kept], f"product_{what}", np.int64, shape)
        parts.append(builder.op("Div", [product, total], f"kept_{what}", np.int64, shape))
    difference = builder.op("Sub", parts, "difference", np.int64, shape)
    return builder.op("Cast", [difference], "scores", F32, shape, to=1)


def _marked(index: np.ndarray, kept: int, total: int) -> np.ndarray:
    """Return the same marks, [n] float32."""
    return ((index + 1) * kept // total - index * kept // total).astype(F32)
