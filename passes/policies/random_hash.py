"""Policy `random`: numbers drawn from the position, so that runs repeat.

    x = position + salt + 1
    number = (((A x + B) mod P) x + C) mod P / P, in [0, 1)

Image rows are ranked by their number; a generated token stays where its number, of another
salt, is below the keep rate. A baseline without weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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

    from dllava_export.passes.graph_builder import GraphBuilder
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["RandomPolicy"]

# A quadratic congruence over a prime just under 2^31. Products stay below 2^63, since they are
# reduced before they are multiplied again.
_PRIME = 2147483647
_A, _B, _C = 48271, 1103515245 % _PRIME, 12345

_IMAGE_SALT, _TEXT_SALT = 0, 1 << 20


class RandomPolicy(Policy):
    """Draws a number for each position."""

    name = "random"
    help = "a hash of the position, so that runs repeat"
    image_tokens = "hash of the position"
    generated_tokens = "hash of the position"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Return the number of each position, [batch, rows] float32."""
        return _hash(builder, rows.position_ids, _IMAGE_SALT)

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return the number of each position, [n] float32."""
        return _hashed(rows.position_ids, _IMAGE_SALT)

    def keep_token(
        self,
        builder: GraphBuilder,
        rows: TextRows,
        keep_rate: float,
        weights: PredictorWeights | None,
    ) -> tuple[gs.Variable, gs.Variable]:
        """Keep a token where its number is below the rate; scores are rate - number."""
        drawn = _hash(builder, rows.position_ids, _TEXT_SALT)
        scores = builder.op(
            "Sub", [builder.scalar(keep_rate, F32), drawn], "margin", F32, list(drawn.shape)
        )
        return scores, keep_above_zero(builder, scores)

    def reference_keep(
        self, rows: TextArrays, keep_rate: float, weights: PredictorWeights | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rate - number twice: it is score and margin."""
        margin = F32(keep_rate) - _hashed(rows.position_ids, _TEXT_SALT)
        return margin, margin


def _hash(builder: GraphBuilder, positions: gs.Variable, salt: int) -> gs.Variable:
    """Return pseudo-random numbers in [0, 1), one per position, float32."""
    shape = list(positions.shape)

    def step(op: str, x: gs.Tensor, value: int, what: str) -> gs.Variable:
        constant = builder.scalar(value, np.int64)
        return builder.op(op, [x, constant], what, np.int64, shape)

    x = step("Add", positions, salt + 1, "salted")
    product = step("Mul", x, _A, "scaled")
    product = step("Add", product, _B, "shifted")
    product = step("Mod", product, _PRIME, "reduced")
    product = builder.op("Mul", [product, x], "quadratic", np.int64, shape)
    product = step("Mod", step("Add", product, _C, "mixed"), _PRIME, "hashed")
    number = builder.op("Cast", [product], "number", F32, shape, to=1)
    prime = builder.scalar(float(_PRIME), F32)
    return builder.op("Div", [number, prime], "uniform_number", F32, shape)


def _hashed(positions: np.ndarray, salt: int) -> np.ndarray:
    """Return the same numbers, [n] float32."""
    found = []
    for position in positions.tolist():  # Python's integers cannot overflow
        x = position + salt + 1
        found.append(((_A * x + _B) % _PRIME * x + _C) % _PRIME)
    return np.array(found, np.int64).astype(F32) / F32(_PRIME)
