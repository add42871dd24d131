"""What policies share: how scores look, and decisions that are the sign of a score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export.errors import PostconditionError

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.passes.graph_builder import GraphBuilder

__all__ = ["F32", "check_scores", "keep_above_zero"]

F32 = np.float32
"""Scores are float32 in every precision, so that all precisions keep the same rows."""


def keep_above_zero(builder: GraphBuilder, scores: gs.Variable) -> gs.Variable:
    """Return scores > 0, [batch, rows] bool."""
    zero = builder.scalar(0.0, F32)
    return builder.op("Greater", [scores, zero], "keep", bool, list(scores.shape))


def check_scores(policy: str, scores: gs.Variable, rows: gs.Variable) -> None:
    """Check that scores are what SelectTokens takes; runtimes say it less clearly, and later.

    Args:
        policy: Who made them.
        scores: What it returned.
        rows: [batch, rows, ...], what it was shown.

    Raises:
        PostconditionError: If they are not [batch, rows] float32.
    """
    found, expected = list(scores.shape or ()), list(rows.shape[:2])
    if scores.dtype != F32 or found != expected:
        raise PostconditionError(
            f"Policy {policy!r} gave scores of type {scores.dtype} and shape {found}, expected "
            f"float32 and {expected}. Cast hidden states to float32 first."
        )
