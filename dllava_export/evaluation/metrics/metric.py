"""What a metric is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from dllava_export.evaluation.proportions import Proportion

__all__ = ["Detail", "Metric", "Truth", "normalised"]

Detail = Proportion | float | None
"""A further number of a metric: a share of counts, or one that is none; None without a value."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """What an answer is compared with.

    Attributes:
        answers: The answers that are right, at least one; VQA has ten, equal ones among them.
        choices: Texts of the options A, B, C and so on; empty where the file has none.
    """

    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


class Metric(ABC):
    """Judges answers.

    Attributes:
        name: What `--metric` takes.
        help: What is right, a few words for `--help`.
        chosen_for: Where it counts if none is asked for, likewise; empty where never.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    chosen_for: ClassVar[str] = ""

    @abstractmethod
    def suits(self, truth: Truth) -> bool:
        """True for a truth of the kind that this metric is made for.

        Where no metric is asked for, the first one counts that suits every question.
        """

    def problem(self, truth: Truth) -> str | None:
        """Return why answers cannot be compared with this truth, `has ..., expected ...`."""
        return None

    @abstractmethod
    def score(self, text: str, truth: Truth) -> float:
        """Return how right an answer is: 0 wrong, 1 right."""

    def details(self, judged: Sequence[tuple[str, Truth]]) -> dict[str, Detail]:
        """Return further numbers of several answers by name; none by default.

        Args:
            judged: Answers, each with its truth.
        """
        return {}


def normalised(text: str) -> str:
    """Return a text with single spaces and without letter case."""
    return " ".join(text.split()).casefold()
