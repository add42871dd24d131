"""Losses and keep rates of a training run as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllava_export.geometry import PredictorConfig
from dllava_export.reporting.output_files import save_plot

__all__ = ["plot_training"]

_BLUE, _ORANGE, _GREEN = "#2a6fbb", "#d1702a", "#3a8f5c"
_NUM_WINDOWS = 40

Entries = Sequence[Mapping[str, Any]]


def plot_training(entries: Entries, predictors: PredictorConfig | None, path: Path) -> None:
    """Draw a log.

    Args:
        entries: One per step, as in the log.
        predictors: What was trained; None for a plain LLaVA, which has no keep rates.
        path: A `.png` file; replaced.
    """
    from matplotlib.figure import Figure

    num_panels = 1 if predictors is None else 3
    figure = Figure(figsize=(1 + 3.9 * num_panels, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    _draw(axes[0], entries, [("ce_loss", "", _GREEN)])
    _style(axes[0], "Cross entropy")
    if predictors is not None:
        text = predictors.has_output_text
        errors = [("image_mask_loss", "image", _BLUE), ("text_mask_loss", "text", _ORANGE)]
        _draw(axes[1], entries, errors if text else errors[:1])
        _style(axes[1], "Keep-rate losses, weighted")
        rates = [("image_keep_rate", "image", _BLUE), ("text_keep_rate", "text", _ORANGE)]
        _draw(axes[2], entries, rates if text else rates[:1])
        targets = [(predictors.vision_keep_rate, _BLUE)]
        if text:
            targets.append((predictors.output_text_keep_rate, _ORANGE))
        for target, colour in targets:
            axes[2].axhline(target, color=colour, linestyle=(0, (4, 3)), linewidth=1)
        axes[2].set_ylim(0, 1)
        _style(axes[2], "Share of tokens kept")
        axes[2].plot([], [], color="0.45", linestyle=(0, (4, 3)), linewidth=1, label="target")
        for panel in axes[1:]:
            panel.legend(frameon=False, loc="upper right")

    save_plot(figure, path)


def _draw(axes: Any, entries: Entries, curves: Sequence[tuple[str, str, str]]) -> None:
    """Draw each key of the log: every step in a pale tone, a moving mean over it."""
    for key, label, colour in curves:
        points = [(e["step"], e[key]) for e in entries if e.get(key) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _moving_mean(values), color=colour, linewidth=1.8, label=label)
    axes.set_ylim(bottom=0)


def _moving_mean(values: Sequence[float]) -> list[float]:
    """Return the mean over a window that ends at each value."""
    window = math.ceil(len(values) / _NUM_WINDOWS)
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(math.fsum(part) / len(part))
    return means


def _style(axes: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color="0.5")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.92")
