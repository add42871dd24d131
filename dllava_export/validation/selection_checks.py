"""Compare decisions: sets of kept rows and keep bits, with margins.

A decision that differs is a flip. Its margin is how far its score is from where the decision
changes; a flip at a small margin is a near-tie that rounding may decide, any other an error.
"""

from __future__ import annotations

import numpy as np

from dllava_export.validation import outputs as out
from dllava_export.validation.checks import MATCH, MISMATCH, Check

__all__ = ["check_keep", "check_kept_images", "image_margins"]

_MAX_LISTED = 8


def image_margins(scores: np.ndarray, num_kept: int) -> np.ndarray:
    """Return how far each score is from the middle between last kept and first dropped.

    Args:
        scores: [n] float32.
        num_kept: How many of the best are kept; infinite margins where that is all or none.

    Returns:
        [n] float64.
    """
    if not 0 < num_kept < len(scores):
        return np.full(len(scores), np.inf)
    ranked = np.sort(scores.astype(np.float64))[::-1]
    return np.abs(scores - ranked[num_kept - 1 : num_kept + 1].mean())


def check_kept_images(
    found: np.ndarray, expected: np.ndarray, scores: np.ndarray | None, margin: float
) -> Check:
    """Compare which image rows are kept.

    Args:
        found: [k] int64, 0-based within the image.
        expected: [k] int64.
        scores: [n] float32 of the reference; None where it has none, then no flip is allowed.
        margin: Flips at larger margins are errors.
    """
    only_here, only_there = np.setdiff1d(found, expected), np.setdiff1d(expected, found)
    num_flips = max(len(only_here), len(only_there))
    if not num_flips:
        detail = f"the same {len(expected)} image rows"
        return Check(out.PREFILL, out.KEPT_INDICES, MATCH, detail=detail)
    detail = f"{num_flips} of {len(expected)} flips"
    is_error = len(found) != len(expected) or scores is None
    if scores is not None:
        flipped = np.concatenate([only_here, only_there])
        margins = image_margins(scores, len(expected))[flipped]
        is_error |= not (margins <= margin).all()
        detail += _margins(float(margins.max()), margin)
    detail += f"; kept only here {_listed(only_here)}, only there {_listed(only_there)}"
    verdict = MISMATCH if is_error else MATCH
    return Check(out.PREFILL, out.KEPT_INDICES, verdict, detail=detail)


def check_keep(
    stage: str, found: bool, expected: bool, decision_margin: float | None, margin: float
) -> Check:
    """Compare a keep bit.

    Args:
        stage: The decode step.
        found: True where the token is kept.
        expected: Likewise.
        decision_margin: Of the reference, signed; None where it is unknown, then no flip is
            allowed.
        margin: A flip at a larger margin is an error.
    """
    bit = f"{'kept' if found else 'dropped'}"
    if found == expected:
        return Check(stage, out.KEEP, MATCH, detail=bit)
    detail = f"{bit}, expected {'kept' if expected else 'dropped'}"
    is_error = True
    if decision_margin is not None:
        is_error = not abs(decision_margin) <= margin
        detail += _margins(abs(decision_margin), margin)
    return Check(stage, out.KEEP, MISMATCH if is_error else MATCH, detail=detail)


def _margins(largest: float, margin: float) -> str:
    if largest <= margin:
        return f", all at margins under {margin:.2g} (largest {largest:.2g})"
    return f", at margins up to {largest:.2g} (allowed {margin:.2g})"


def _listed(rows: np.ndarray) -> str:
    shown = ", ".join(str(row) for row in rows[:_MAX_LISTED])
    return f"{shown or 'none'}{', …' if len(rows) > _MAX_LISTED else ''}"
