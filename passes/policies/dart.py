"""Policy `dart`: what resembles a few pivots least stays, and the pivots themselves.

    pivots = the 8 image rows with the longest hidden states
    score of row i = 2 for a pivot, else -max over pivots p of cos(hidden[i], hidden[p])

Duplicates go, whatever they show: a background that repeats itself leaves few rows. The
published method picks rows pivot by pivot, each time from those that are left; this one ranks
all rows at once by their nearest pivot, so that the graph needs no loop and any number may be
kept. It does not look at the question, and needs neither weights nor attention.

Source    DART (arXiv:2502.11494): pivots, and the cosine to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.passes.policies.base import ImageArrays, ImageRows, Policy
from dllava_export.passes.policies.scores import F32, is_image_row, unit_arrays, unit_rows

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.geometry import Geometry
    from dllava_export.passes.graph_builder import GraphBuilder, Shape
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["DartPolicy"]

_NUM_PIVOTS = 8
_PIVOT, _NO_PIVOT = 2.0, -2.0  # above and below every cosine
_NO_LENGTH = -1.0


class DartPolicy(Policy):
    """Ranks image rows by how little they resemble the nearest of a few pivots."""

    name = "dart"
    help = "what resembles a few pivots least"
    image_tokens = "least cosine to the nearest of 8 pivots, the longest hidden states"
    score_meaning = "unlike the pivots; 2 for a pivot"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Score all rows, image or not: in decode there is one, a length of none is refused."""
        shape = list(rows.token_kind.shape)
        hidden = builder.op(
            "Cast", [rows.hidden_states], "hidden_f32", F32, rows.hidden_states.shape, to=1
        )
        unit, length = unit_rows(builder, hidden)
        length = builder.op("Squeeze", [length, builder.ints(-1)], "row_length", F32, shape)
        is_image = is_image_row(builder, rows.token_kind)
        other = builder.scalar(_NO_LENGTH, F32)
        length = builder.op("Where", [is_image, length, other], "image_length", F32, shape)
        longest, pivot = _longest(builder, length)
        nearest = _nearest(builder, unit, longest, pivot)
        unlike = builder.op("Neg", [nearest], "unlike", F32, shape)
        shortest = builder.op(
            "ReduceMin", [longest, builder.ints(1)], "shortest", F32, [shape[0], 1], keepdims=1
        )
        is_pivot = builder.op("GreaterOrEqual", [length, shortest], "is_pivot", bool, shape)
        highest = builder.scalar(_PIVOT, F32)
        return builder.op("Where", [is_pivot, highest, unlike], "scores", F32, shape)

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return scores, [n] float32."""
        length = np.linalg.norm(rows.hidden_states.astype(np.float64), axis=-1)
        pivots = np.argsort(-length, kind="stable")[:_NUM_PIVOTS]
        unit = unit_arrays(rows.hidden_states)
        scores = -(unit @ unit[pivots].T).max(-1)
        scores[length >= length[pivots].min()] = _PIVOT
        return scores.astype(F32)

    def image_flops(self, geometry: Geometry) -> int:
        """Count the products of all image rows with the pivots."""
        return 2 * geometry.num_image_tokens * _NUM_PIVOTS * geometry.hidden_size


def _longest(builder: GraphBuilder, length: gs.Variable) -> tuple[gs.Variable, gs.Variable]:
    """Return the lengths of the pivots and their rows, both [batch, 8].

    Where there are fewer image rows the length is -1, and the row may not exist. The number is
    fixed, so that shapes are known before anything runs.
    """
    batch, num_rows = length.shape
    pads, other = builder.ints(0, 0, 0, _NUM_PIVOTS), builder.scalar(_NO_LENGTH, F32)
    shape: Shape = [batch, f"{num_rows} + {_NUM_PIVOTS}"]
    padded = builder.op("Pad", [length, pads, other], "padded_length", F32, shape)
    shape = [batch, _NUM_PIVOTS]
    longest, pivot = builder.multi_op(
        "TopK",
        [padded, builder.ints(_NUM_PIVOTS)],
        [("longest", F32, shape), ("pivot", np.int64, shape)],
        axis=1,
        largest=1,
        sorted=1,
    )
    return longest, pivot


def _nearest(
    builder: GraphBuilder, unit: gs.Variable, longest: gs.Variable, pivot: gs.Variable
) -> gs.Variable:
    """Return the cosine to the nearest pivot, [batch, rows]; -2 without an image."""
    batch, num_rows, size = unit.shape
    shape: Shape = [batch, _NUM_PIVOTS]
    zero, first = builder.scalar(0.0, F32), builder.scalar(0, np.int64)
    is_there = builder.op("GreaterOrEqual", [longest, zero], "is_there", bool, shape)
    index = builder.op("Where", [is_there, pivot, first], "pivot_row", np.int64, shape)
    direction = builder.op(
        "GatherTokens", [unit, index], "direction", F32, [*shape, size], domain=names.DOMAIN
    )
    shape = [batch, size, _NUM_PIVOTS]
    direction = builder.op("Transpose", [direction], "direction_t", F32, shape, perm=[0, 2, 1])
    table = [batch, num_rows, _NUM_PIVOTS]
    cosine = builder.op("MatMul", [unit, direction], "cosine", F32, table)
    column = builder.op(
        "Unsqueeze", [is_there, builder.ints(1)], "is_there_1", bool, [batch, 1, _NUM_PIVOTS]
    )
    none = builder.scalar(_NO_PIVOT, F32)
    cosine = builder.op("Where", [column, cosine, none], "pivot_cosine", F32, table)
    return builder.op(
        "ReduceMax", [cosine, builder.ints(-1)], "nearest", F32, [batch, num_rows], keepdims=0
    )
