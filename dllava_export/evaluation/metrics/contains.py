"""Metric `contains`: one of the truths stands in the answer."""

from __future__ import annotations

import re

from dllava_export.evaluation.metrics.metric import Metric, Truth, normalised

__all__ = ["Contains"]


class Contains(Metric):
    """Right is an answer in which a truth stands, letter case and white space aside.

    A truth that starts or ends inside a word or number does not count: 5 is not in 15. That is
    so for Latin letters and digits only: other scripts may have no spaces between words.
    """

    name = "contains"
    help = "a truth stands in the answer as whole words"

    def suits(self, truth: Truth) -> bool:
        """False: no file shows that whole sentences are expected, so it must be asked for."""
        return False

    def score(self, text: str, truth: Truth) -> float:
        """Return 1 if one of the truths stands in the answer, else 0."""
        answer = normalised(text)
        return float(any(_stands_in(normalised(one), answer) for one in truth.answers))


def _stands_in(part: str, text: str) -> bool:
    before = "(?<![0-9a-z])" if re.match("[0-9a-z]", part) else ""
    after = "(?![0-9a-z])" if re.search("[0-9a-z]$", part) else ""
    return re.search(before + re.escape(part) + after, text) is not None
