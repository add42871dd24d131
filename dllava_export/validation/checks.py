"""One comparison and its verdict; how arrays are measured against each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dllava_export.validation.settings import Tolerances

__all__ = ["DRIFT", "MATCH", "MISMATCH", "Check", "compare_rows", "compare_values", "cosine"]

MATCH, MISMATCH, DRIFT = "match", "mismatch", "drift"
"""DRIFT: the two sides compute this from different rows, so that it is measured, not judged."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What one comparison found.

    Attributes:
        stage: `visual`, `prefill`, `decode.3`, `cache` or `recompute`.
        what: What was compared, for example `logits` or `layers.2/key`.
        verdict: `match`, `mismatch` or `drift`.
        max_abs: Largest absolute difference, or None where nothing is measured.
        relative: Largest relative error of a row in the 2-norm, or None.
        cosine: Smallest cosine of two rows, or None.
        detail: More, in words.
    """

    stage: str
    what: str
    verdict: str
    max_abs: float | None = None
    relative: float | None = None
    cosine: float | None = None
    detail: str = ""

    def __bool__(self) -> bool:
        """False for a mismatch, as polygraphy asks."""
        return self.verdict != MISMATCH

    @property
    def place(self) -> str:
        """Stage and what, as outputs are named."""
        return f"{self.stage}/{self.what}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields; numbers that are not finite become text."""
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if isinstance(value, float) and not np.isfinite(value):
                values[name] = str(value)
        return values


def compare_values(
    stage: str,
    what: str,
    found: np.ndarray,
    expected: np.ndarray,
    tolerances: Tolerances,
    *,
    judged: bool,
    detail: str = "",
) -> Check:
    """Compare two arrays by polygraphy's error statistics.

    Args:
        stage: Where they come from.
        what: What they are.
        found: Any shape; the last axis is a row.
        expected: Of the same shape.
        tolerances: What is allowed.
        judged: False measures only.
        detail: In words.
    """
    from polygraphy.comparator import IterationResult, SimpleCompareFunc

    if found.shape != expected.shape:
        shapes = f"shape {list(found.shape)}, expected {list(expected.shape)}"
        return Check(stage, what, MISMATCH, detail=shapes)
    a, b = found.astype(np.float32), expected.astype(np.float32)
    compare = SimpleCompareFunc(
        rtol=tolerances.rtol,
        atol=tolerances.atol,
        check_error_stat=tolerances.check_error_stat,
    )
    result = compare(IterationResult({what: a}), IterationResult({what: b}))[what]
    verdict = DRIFT if not judged else MATCH if result else MISMATCH
    return Check(stage, what, verdict, *_measure(a, b), detail)


def compare_rows(
    stage: str,
    what: str,
    found: np.ndarray,
    expected: np.ndarray,
    tolerances: Tolerances,
    *,
    judged: bool,
    detail: str = "",
) -> Check:
    """Compare vectors row by row, each as a whole.

    A row may be off by `rtol` of its length or by `atol` in each element: single elements of
    hidden states may be small beside the rounding of the large ones.

    Args:
        stage: Where they come from.
        what: What they are.
        found: [rows, width].
        expected: [rows, width].
        tolerances: What is allowed.
        judged: False measures only.
        detail: In words.
    """
    a, b = found.astype(np.float32), expected.astype(np.float32)
    difference = np.abs(a - b)
    is_close = (_relative(a, b) <= tolerances.rtol) | (
        difference.max(axis=1, initial=0) <= tolerances.atol
    )
    verdict = DRIFT if not judged else MATCH if is_close.all() else MISMATCH
    if verdict == MISMATCH:
        off = int((~is_close).sum())
        detail = f"{off} of {len(is_close)} rows are off" + (f", {detail}" if detail else "")
    return Check(stage, what, verdict, *_measure(a, b), detail)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of rows [..., width]; 1 for two rows of zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(lengths > 0, (a * b).sum(-1) / np.where(lengths > 0, lengths, 1), 1.0)


def _relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the error of each row over its length; 0 for two rows of zeros."""
    error, length = np.linalg.norm(a - b, axis=-1), np.linalg.norm(b, axis=-1)
    return error / np.maximum(length, np.finfo(np.float32).tiny)


def _measure(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Return largest absolute difference, largest relative error, smallest cosine of rows."""
    return (
        float(np.abs(a - b).max(initial=0)),
        float(_relative(a, b).max(initial=0)),
        float(cosine(a, b).min(initial=1)),
    )
