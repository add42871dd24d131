"""Draw a sweep: accuracy against image tokens kept, and against time, a line per policy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dllava_export.errors import InvalidInputError
from dllava_export.passes.policies.registry import NO_POLICY
from dllava_export.reporting.output_files import check_plot_format, save_plot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dllava_export.evaluation.report import BundleResult, EvaluationReport

__all__ = ["plot_sweep"]

_COLOURS = (
    "#2a6fbb", "#d1702a", "#3a8f5c", "#8e5ea2", "#c0392b", "#7a6a3a", "#3aa6a6", "#d4669a",
)  # fmt: skip
_DENSE = "#8a919e"


def plot_sweep(report: EvaluationReport, path: str | os.PathLike[str]) -> None:
    """Draw accuracies with their 95 % intervals over image tokens and over seconds.

    Args:
        report: Of a sweep, `image_keep_tokens` in its settings.
        path: Where to; the suffix .png, .svg or .pdf gives the format.

    Raises:
        SettingError: If the suffix is another.
        InvalidInputError: If the report is of no sweep, or the file cannot be written.
    """
    check_plot_format(path)
    if not report.settings.image_keep_tokens:
        raise InvalidInputError(
            "The report compares bundles as they are, expected one of several numbers of image "
            "tokens. Evaluate with image_keep_tokens."
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (label, results) in enumerate(_curves(report).items()):
        is_dense = results[0].policy == NO_POLICY
        style = {"color": _DENSE if is_dense else _COLOURS[number % len(_COLOURS)],
                 "linestyle": "none" if is_dense else "-", "label": label}  # fmt: skip
        _draw(left, [result.total.kept_image_tokens for result in results], results, style)
        _draw(right, [result.seconds_per_question for result in results], results, style)
    _style(left, "image tokens kept")
    _tick_powers(left, report)
    left.set_ylabel(f"accuracy ({report.settings.metric}), %")
    _style(right, "seconds per question")
    right.set_xlim(left=0)
    right.legend(frameon=False, loc="best", fontsize=9)
    count = len(report.results[0].answers)
    figure.suptitle(
        f"{count} questions of {report.data.name}; bars: 95 % intervals", x=0.01, ha="left",
        fontsize=10, color="0.3",
    )  # fmt: skip
    save_plot(figure, path)


def _curves(report: EvaluationReport) -> dict[str, list[BundleResult]]:
    """Return results of one bundle and policy together, few tokens first."""
    has_several = len({result.path for result in report.results}) > 1
    curves: dict[str, list[BundleResult]] = {}
    for result in report.results:
        policy = "dense" if result.policy == NO_POLICY else result.policy
        label = f"{result.path.name}: {policy}" if has_several else policy
        curves.setdefault(label, []).append(result)
    for results in curves.values():
        results.sort(key=lambda result: result.total.kept_image_tokens or 0)
    return curves


def _draw(
    axes: Any, places: Sequence[float | None], results: Sequence[BundleResult], style: Any
) -> None:
    shares = [100 * result.total.accuracy for result in results]
    ends = [result.total.right.interval or (0.0, 1.0) for result in results]
    below = [share - 100 * low for share, (low, _) in zip(shares, ends, strict=True)]
    above = [100 * high - share for share, (_, high) in zip(shares, ends, strict=True)]
    # Rounding may leave a hair less than nothing, which matplotlib refuses.
    lengths = [[max(0.0, length) for length in side] for side in (below, above)]
    axes.errorbar(
        places, shares, lengths, marker="o", markersize=5, linewidth=1.8, elinewidth=1,
        capsize=3, **style,
    )  # fmt: skip


def _tick_powers(axes: Any, report: EvaluationReport) -> None:
    """Spread few tokens, where curves part, and name each number that was asked."""
    counts = {round(result.total.kept_image_tokens or 0) for result in report.results}
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(counts), [str(count) for count in sorted(counts)])
    axes.minorticks_off()


def _style(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_ylim(-2, 102)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color="0.5")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.92")
