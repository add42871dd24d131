"""Metric `exact`: the answer is one of the truths."""

from __future__ import annotations

from dllava_export.evaluation.metrics.metric import Metric, Truth, normalised

__all__ = ["Exact"]


class Exact(Metric):
    """Right is an answer that equals one of the truths, letter case and white space aside."""

    name = "exact"
    help = "the answer is a truth, letter case and white space aside"
    chosen_for = "any file"

    def suits(self, truth: Truth) -> bool:
        """True for any."""
        return True

    def score(self, text: str, truth: Truth) -> float:
        """Return 1 if the answer is one of the truths, else 0."""
        return float(normalised(text) in map(normalised, truth.answers))
