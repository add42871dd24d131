"""Draw what sparsification saves: rows and KV bytes per layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dllava_export.cost.inspection import InspectionReport
from dllava_export.reporting.byte_sizes import byte_unit, format_bytes
from dllava_export.reporting.output_files import check_plot_format, save_plot

__all__ = ["plot_report"]


def plot_report(report: InspectionReport, path: str | os.PathLike[str]) -> None:
    """Draw rows and KV cache per decoder layer, dense beside sparse.

    The file appears under its name only when it is complete.

    Args:
        report: What to draw.
        path: Where to; the suffix .png, .svg or .pdf gives the format.

    Raises:
        SettingError: If the suffix is another.
    """
    check_plot_format(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    rows_axes, kv_axes = figure.subplots(1, 2)
    _draw_layers(rows_axes, report.rows)
    rows_axes.set_title("Prefill", loc="left", fontweight="bold")
    rows_axes.set_ylabel("rows")
    per_layer = [report.kv_bytes_per_layer(index) for index in (0, 1)]
    unit, size = byte_unit(max(*per_layer[0], *per_layer[1]))
    _draw_layers(kv_axes, [[value / size for value in side] for side in per_layer])
    kv_axes.set_title(
        f"KV cache after {report.output_len} generated tokens", loc="left", fontweight="bold"
    )
    kv_axes.set_ylabel(f"{unit} per layer")
    totals = [report.kv_total(index) for index in (0, 1)]
    _add_legend(rows_axes, [f"{sum(rows):,} rows in all" for rows in report.rows])
    _add_legend(kv_axes, [f"{format_bytes(total)} in all" for total in totals])
    figure.suptitle(_plot_title(report), x=0.01, ha="left", fontsize=10, color="0.3")
    save_plot(figure, path)


def _draw_layers(axes: Any, sides: Sequence[Sequence[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = range(len(sides[0]))
    axes.bar(layers, sides[0], width=0.86, color="#d9dce1")
    axes.bar(layers, sides[1], width=0.86, color="#2a6fbb")
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylim(0, 1.05 * max(*sides[0], *sides[1]))
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color="0.5")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.92")


def _add_legend(axes: Any, totals: Sequence[str]) -> None:
    labels = [
        f"{name}: {total}" for name, total in zip(("dense", "sparse"), totals, strict=True)
    ]
    axes.legend(
        axes.containers,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=2,
        frameon=False,
    )


def _plot_title(report: InspectionReport) -> str:
    return (
        f"{report.prompt_text_len} text tokens, one image; "
        f"{report.describe_sparsity().replace('; ', ', ')}"
    )
