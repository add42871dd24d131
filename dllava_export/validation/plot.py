"""Draw where two runs part: errors over layers, errors over decode steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dllava_export.reporting.output_files import check_plot_format, save_plot
from dllava_export.validation import outputs as out
from dllava_export.validation.checks import DRIFT, Check
from dllava_export.validation.report import ValidationReport

__all__ = ["plot_drift"]

_INK, _MUTED, _RED, _SHADE = "#1f2430", "#6b7280", "#c8321f", "#f1f3f6"
_FLOOR = 1e-9  # stands for an error of 0 on a logarithmic axis
_WIDTH, _HEIGHT = 6.0, 4.2  # inches of a panel

# Stage, quantity, label, colour, marker.
_CURVES = (
    (out.PREFILL, "key", "keys, prefill", "#2a6fbb", "o"),
    (out.PREFILL, "value", "values, prefill", "#3a8f5c", "s"),
    (out.PREFILL, out.HIDDEN_STATES, "hidden states, prefill", "#12395f", "D"),
    ("decode", out.HIDDEN_STATES, "hidden states, worst decode step", "#d1902a", "^"),
    (out.RECOMPUTE, out.HIDDEN_STATES, "hidden states, recompute", "#8a5fb0", "v"),
)


def plot_drift(report: ValidationReport, path: str | os.PathLike[str]) -> None:
    """Draw relative errors. The file appears under its name only when it is complete.

    Filled markers are judged, hollow ones drift by design, red rings are mismatches.

    Args:
        report: What was found; without layers there is one panel, over steps.
        path: Where to; the suffix .png, .svg or .pdf gives the format.

    Raises:
        SettingError: If the suffix is another.
        OSError: If the file cannot be written.
    """
    from matplotlib.figure import Figure

    check_plot_format(path)
    num_panels = 2 if report.has_layers else 1
    figure = Figure(
        figsize=(_WIDTH * num_panels, _HEIGHT),
        dpi=150,
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    if report.has_layers:
        _draw_layers(panels[0], report)
    _draw_steps(panels[-1], report)
    first = report.first_mismatch
    verdict = "match" if first is None else f"first mismatch: {first.place}"
    figure.suptitle(
        f"{report.candidate} against {report.reference}\n{verdict}",
        x=0.01,
        ha="left",
        fontsize=10,
        color=_INK if first is None else _RED,
    )
    save_plot(figure, path)


def _draw_layers(axes: Any, report: ValidationReport) -> None:
    num_layers = report.shape.num_layers
    for stage, quantity, label, colour, marker in _CURVES:
        worst = []
        for index in range(num_layers):
            what = f"layers.{index}/{quantity}"
            found = [
                check
                for check in report.checks
                if check.what == what
                and check.stage.split(".")[0] == stage
                and check.relative is not None
            ]
            if found:
                worst.append((index, max(found, key=_order)))
        if worst:
            _draw_curve(axes, worst, label, colour, marker)
    if not report.sparsity.is_dense:
        axes.axvspan(
            report.sparsity.sparse_layer - 0.5,
            num_layers - 0.5,
            color=_SHADE,
            zorder=0,
            label="layers that see kept rows",
        )
    axes.set_xlim(-0.5, num_layers - 0.5)
    _finish(axes, report, "By decoder layer", "decoder layer")


def _draw_steps(axes: Any, report: ValidationReport) -> None:
    logits = [check for check in report.checks if check.what == out.LOGITS]
    points = [
        (position, check)
        for position, check in enumerate(logits)
        if check.relative is not None
    ]
    if points:
        _draw_curve(axes, points, "logits", "#2a6fbb", "o")
    flips = [
        index
        for index, check in enumerate(logits)
        if any(
            c.stage == check.stage and c.what in _DECISIONS and not c for c in report.checks
        )
    ]
    for number, index in enumerate(flips):
        axes.axvline(
            index, color=_RED, linewidth=1, label="" if number else "decisions differ"
        )
    ticks = sorted({0, len(logits) // 2, len(logits) - 1})
    axes.set_xticks(ticks, [_step_label(logits[tick].stage) for tick in ticks])
    axes.set_xlim(-0.5, len(logits) - 0.5)
    _finish(axes, report, "Logits, step by step", "decode step")


_DECISIONS = (out.KEPT_INDICES, out.KEEP, out.NUM_ROWS)


def _step_label(stage: str) -> str:
    """Return `prefill`, `recompute`, or the number of a decode step."""
    return stage.removeprefix("decode.")


def _draw_curve(
    axes: Any, points: Sequence[tuple[int, Check]], label: str, colour: str, marker: str
) -> None:
    positions = [position for position, _ in points]
    values = [_drawn(check) for _, check in points]
    axes.plot(positions, values, color=colour, linewidth=1.2, alpha=0.7)
    for is_drift in (False, True):
        part = [
            (position, value)
            for position, value, (_, check) in zip(positions, values, points, strict=True)
            if (check.verdict == DRIFT) == is_drift
        ]
        axes.plot(
            [position for position, _ in part],
            [value for _, value in part],
            linestyle="none",
            marker=marker,
            markersize=4.5,
            color=colour,
            markerfacecolor="white" if is_drift else colour,
        )
    axes.plot([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.2, label=label)
    failed = [
        (position, value)
        for position, value, (_, check) in zip(positions, values, points, strict=True)
        if not check
    ]
    axes.plot(
        [position for position, _ in failed],
        [value for _, value in failed],
        linestyle="none",
        marker="o",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor=_RED,
        markeredgewidth=1.4,
    )


def _order(check: Check) -> tuple[bool, float]:
    """Mismatches come last, then the largest error."""
    return not check, _drawn(check)


def _drawn(check: Check) -> float:
    assert check.relative is not None
    value = check.relative
    return max(value, _FLOOR) if value < float("inf") else 1.0  # false for NaN too


def _finish(axes: Any, report: ValidationReport, title: str, what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_yscale("log")
    axes.axhline(
        report.tolerances.rtol,
        color=_MUTED,
        linestyle=(0, (4, 3)),
        linewidth=1,
        label=f"rtol {report.tolerances.rtol:g}",
    )
    axes.set_ylim(_FLOOR / 3, 1e3)  # errors end near 1; the legend stands above them
    if what == "decoder layer":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10, color=_INK)
    axes.set_xlabel(what, color=_MUTED)
    axes.set_ylabel("relative error, worst row; 0 at 1e-9", color=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color="0.5")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.92")
    axes.legend(frameon=False, fontsize=7.5, loc="upper left", ncols=2)
