"""Metric `pope`: yes or no, with precision, recall, F1 and the share of yes."""

from __future__ import annotations

from collections.abc import Sequence

from dllava_export.evaluation.metrics.metric import Detail, Metric, Truth, normalised
from dllava_export.evaluation.proportions import Proportion

__all__ = ["Pope"]

_NO = frozenset({"No", "no", "not"})


class Pope(Metric):
    """Yes or no: is an object in the picture?

    An answer says no where its first sentence has a word `No`, `no` or `not`; any other one
    says yes, an empty one too.

    Source: Li et al., Evaluating object hallucination in large vision-language models, EMNLP
        2023; answers read as in haotian-liu/LLaVA: llava/eval/eval_pope.py.
    """

    name = "pope"
    help = "yes or no, with precision, recall, F1 and yes-rate"
    chosen_for = "truths that are all yes or no"

    def suits(self, truth: Truth) -> bool:
        """True where the truth is yes or no."""
        return self.problem(truth) is None and not truth.choices

    def problem(self, truth: Truth) -> str | None:
        """Refuse a truth other than yes or no."""
        if len(truth.answers) == 1 and normalised(truth.answers[0]) in ("yes", "no"):
            return None
        found = truth.answers[0] if len(truth.answers) == 1 else list(truth.answers)
        return f"has the answer {found!r}, expected yes or no for metric {self.name}"

    def score(self, text: str, truth: Truth) -> float:
        """Return 1 if the answer says the same as the truth, else 0."""
        return float(_says_yes(text) == _is_yes(truth))

    def details(self, judged: Sequence[tuple[str, Truth]]) -> dict[str, Detail]:
        """Return precision and recall of yes, their F1, and how often the answer is yes.

        F1 = 2 TP / (2 TP + FP + FN) is no share of a count and has no Wilson interval.
        """
        pairs = [(_says_yes(text), _is_yes(truth)) for text, truth in judged]
        hits = sum(said and true for said, true in pairs)
        said = sum(said for said, _ in pairs)
        true = sum(true for _, true in pairs)
        return {
            "precision": Proportion(hits, said),
            "recall": Proportion(hits, true),
            "F1": 2 * hits / (said + true) if said + true else None,
            "yes-rate": Proportion(said, len(pairs)),
        }


def _says_yes(text: str) -> bool:
    words = text.strip().split(".")[0].replace(",", "").split()
    return _NO.isdisjoint(words)


def _is_yes(truth: Truth) -> bool:
    return normalised(truth.answers[0]) == "yes"
