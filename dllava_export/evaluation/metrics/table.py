"""All metrics: what `--metric` offers and what a file's questions are judged by."""

from __future__ import annotations

from collections.abc import Iterable

from dllava_export.errors import SettingError
from dllava_export.evaluation.metrics.contains import Contains
from dllava_export.evaluation.metrics.exact import Exact
from dllava_export.evaluation.metrics.metric import Metric, Truth
from dllava_export.evaluation.metrics.multiple_choice import MultipleChoice
from dllava_export.evaluation.metrics.pope import Pope
from dllava_export.evaluation.metrics.vqa import Vqa
from dllava_export.registries import close_match

__all__ = ["METRICS", "metric_by_name", "suitable_metric"]

METRICS: tuple[Metric, ...] = (MultipleChoice(), Pope(), Vqa(), Contains(), Exact())
"""In the order in which they are tried on a file; `exact` suits any."""


def metric_by_name(name: str) -> Metric:
    """Return a metric.

    Raises:
        SettingError: If there is none of that name.
    """
    known = {metric.name: metric for metric in METRICS}
    if name not in known:
        raise SettingError(
            f"metric must be one of {', '.join(known)}, got {name!r}. "
            f"{close_match(name, tuple(known))}".rstrip()
        )
    return known[name]


def suitable_metric(truths: Iterable[Truth]) -> Metric:
    """Return the first metric that suits all truths of a file."""
    all_truths = list(truths)
    return next(m for m in METRICS if all(map(m.suits, all_truths)))
