"""What policies share: how scores look, decisions by their sign, lengths and directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.errors import PostconditionError

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.passes.graph_builder import GraphBuilder

__all__ = [
    "F32",
    "check_scores",
    "is_image_row",
    "keep_above_zero",
    "unit_arrays",
    "unit_rows",
]

F32 = np.float32
"""Scores are float32 in every precision, so that all precisions keep the same rows."""


_SHORTEST = 1e-12  # a row of zeros has no direction, and must not make NaN


def is_image_row(builder: GraphBuilder, token_kind: gs.Tensor) -> gs.Variable:
    """Return which rows compete, [batch, rows] bool."""
    image = builder.scalar(names.IMAGE, np.int64)
    return builder.op("Equal", [token_kind, image], "is_image", bool, list(token_kind.shape))


def unit_rows(builder: GraphBuilder, rows: gs.Variable) -> tuple[gs.Variable, gs.Variable]:
    """Divide vectors by their lengths.

    Args:
        builder: Where new nodes are named.
        rows: [..., size] float32; not empty, ONNX Runtime gets the shape of no lengths wrong.

    Returns:
        [..., size] and lengths [..., 1], both float32.
    """
    shape = list(rows.shape)
    column = [*shape[:-1], 1]
    axis = builder.ints(-1)
    length = builder.op("ReduceL2", [rows, axis], "length", F32, column, keepdims=1)
    shortest = builder.scalar(_SHORTEST, F32)
    divisor = builder.op("Max", [length, shortest], "divisor", F32, column)
    return builder.op("Div", [rows, divisor], "unit", F32, shape), length


def unit_arrays(rows: np.ndarray) -> np.ndarray:
    """Divide vectors [..., size] by their lengths, in float64."""
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), _SHORTEST)


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
