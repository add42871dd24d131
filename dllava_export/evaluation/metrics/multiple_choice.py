"""Metric `multiple-choice`: the letter of an option."""

from __future__ import annotations

import re
import string

from dllava_export.evaluation.metrics.metric import Metric, Truth, normalised

__all__ = ["MultipleChoice"]

_PATTERNS = (
    re.compile(r"^\(?([A-Za-z])\)?[.:]?$"),  # B, b, (B), B.
    re.compile(r"^\(([A-Z])\)"),  # (B) a dog
    re.compile(r"^([A-Z])[.):]"),  # B. a dog
    re.compile(r"\banswer is:? \(?([A-Z])\b", re.IGNORECASE),
)


class MultipleChoice(Metric):
    """Right is an answer that names the option which is the truth.

    It names an option by its letter, alone or in front (`B`, `(B)`, `B. a dog`), by `the answer
    is B`, or by the option's whole text. Any other answer is wrong; none is guessed.

    Source: ScienceQA as LLaVA judges it (haotian-liu/LLaVA: llava/eval/eval_science_qa.py),
        with brackets and whole options beside.
    """

    name = "multiple-choice"
    help = "the letter or the text of the right option"
    chosen_for = "files whose questions all have options"

    def suits(self, truth: Truth) -> bool:
        """True where the file has the options."""
        return bool(truth.choices)

    def problem(self, truth: Truth) -> str | None:
        """Refuse a truth that is no letter of an option."""
        letters = _letters(truth)
        for answer in truth.answers:
            if answer not in letters:
                return (
                    f"has the answer {answer!r}, expected the letter of an option, "
                    f"{letters[0]} to {letters[-1]}, for metric {self.name}"
                )
        return None

    def score(self, text: str, truth: Truth) -> float:
        """Return 1 if the answer names the right option, else 0."""
        return float(_chosen(text, truth) in truth.answers)


def _letters(truth: Truth) -> str:
    return string.ascii_uppercase[: len(truth.choices) or None]


def _chosen(text: str, truth: Truth) -> str | None:
    """Return the letter of the option that an answer names."""
    answer = text.strip()
    letters = _letters(truth)
    for pattern in _PATTERNS:
        found = pattern.search(answer)
        if found and found[1].upper() in letters:
            return found[1].upper()
    for letter, choice in zip(letters, truth.choices, strict=False):
        if normalised(choice).rstrip(".") == normalised(answer).rstrip("."):
            return letter
    return None
