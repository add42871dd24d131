"""Shares of counts with their 95 % confidence intervals, so that nobody reads noise."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Proportion", "difference_interval"]

_Z = 1.959963984540054  # 97.5 % of the standard normal distribution lie below


@dataclasses.dataclass(frozen=True)
class Proportion:
    """`count` of `total`.

    Attributes:
        count: How many; partly right answers count by their share.
        total: Out of how many; 0 where there was nothing to count.
    """

    count: float
    total: int

    @property
    def share(self) -> float | None:
        """The share in [0, 1]; None of nothing."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % score interval of the share, in [0, 1]; None of nothing.

        Where partly right answers are counted it is too wide rather than too narrow: of all
        values in [0, 1] with the same mean, zeros and ones scatter most.

        Source: E. B. Wilson, Probable inference, the law of succession, and statistical
            inference, JASA 22 (1927).
        """
        if not self.total:
            return None
        share, weight = self.count / self.total, _Z**2 / self.total
        middle = (share + weight / 2) / (1 + weight)
        # Rounding may leave a hair less than nothing below the root.
        spread = math.sqrt(max(0.0, share * (1 - share) * weight + weight**2 / 4))
        half = spread / (1 + weight)
        low = 0.0 if self.count == 0 else max(0.0, middle - half)
        high = 1.0 if self.count == self.total else min(1.0, middle + half)
        return low, high


def difference_interval(first: Proportion, second: Proportion) -> tuple[float, float] | None:
    """Return the 95 % interval of `first.share - second.share`; None where one has no share.

    Answers to the same questions go together, which this leaves out: it is rather too wide.

    Source: R. G. Newcombe, Interval estimation for the difference between independent
        proportions, Statistics in Medicine 17 (1998), method 10.
    """
    if first.interval is None or second.interval is None:
        return None
    one, two = first.count / first.total, second.count / second.total
    (low_1, high_1), (low_2, high_2) = first.interval, second.interval
    return (
        one - two - math.hypot(one - low_1, high_2 - two),
        one - two + math.hypot(high_1 - one, two - low_2),
    )
