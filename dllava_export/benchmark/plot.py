"""Draw one geometry: prefill, decode against generated tokens, peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllava_export.benchmark.results import CaseResult, GeometryResult, Spread
from dllava_export.benchmark.subject import DENSE, SPARSE, SUBJECTS
from dllava_export.reporting.output_files import save_plot

__all__ = ["bar_label", "plot_geometry", "subject_colour"]

_INK, _MUTED = "0.15", "0.4"
_OWN_COLOURS = {SPARSE: "#2a6fbb", DENSE: "#9cc3e8"}
_PEER_COLOURS = ("#e9a23b", "#c0392b", "#5a8f4d", "#8a919e")


def plot_geometry(result: GeometryResult, path: Path) -> None:
    """Draw a row of three panels for each batch size; bars and points are medians.

    Args:
        result: What to draw.
        path: Where to; a .png, .svg or .pdf file.

    Raises:
        InvalidInputError: If the file cannot be written.
        SettingError: If the suffix is another.
    """
    from matplotlib.figure import Figure

    num_rows = len(result.cases)
    figure = Figure(figsize=(14, 3.6 * num_rows + 0.9), dpi=130, layout="constrained")
    grid = figure.subplots(num_rows, 3, squeeze=False, width_ratios=(1, 1.3, 1))
    for row, case in zip(grid, result.cases, strict=True):
        prefill = {name: Spread.of(t.prefill_ms) for name, t in case.times.items()}
        _draw_bars(row[0], prefill, "prefill, ms")
        _draw_decode(row[1], case)
        peaks = {
            name: Spread.of([(t.memory["decode"].peak_rss_bytes or 0) / 2**30])
            for name, t in case.times.items()
        }
        _draw_bars(row[2], peaks, "peak RSS of the process, GiB")
        row[0].set_title(f"Batch {case.batch_size}", loc="left", fontweight="bold", color=_INK)
    handles, labels = grid[0][1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
        fontsize=9, labelcolor=_INK,
    )  # fmt: skip
    figure.suptitle(
        f"{result.geometry.title}: {result.geometry.to_text()}", x=0.01, ha="left",
        fontsize=10, color="0.3",
    )  # fmt: skip
    save_plot(figure, path)


def subject_colour(name: str) -> str:
    """Return the colour of a subject, another for each of `SUBJECTS`."""
    peers = [peer for peer in SUBJECTS if peer not in _OWN_COLOURS]
    return _OWN_COLOURS.get(name) or _PEER_COLOURS[peers.index(name)]


def _draw_bars(axes: Any, values: dict[str, Spread], label: str) -> None:
    places = range(len(values))
    medians = [spread.median for spread in values.values()]
    axes.barh(places, medians, 0.7, color=[subject_colour(name) for name in values])
    for place, spread in zip(places, values.values(), strict=True):
        axes.plot((spread.low, spread.high), (place, place), color=_INK, linewidth=1.2)
        axes.text(
            max(spread.high, spread.median) + 0.01 * max(medians), place,
            bar_label(spread.median), va="center", fontsize=8.5, color=_INK,
        )  # fmt: skip
    axes.set_yticks(places, list(values), fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(spread.high for spread in values.values()))
    axes.set_xlabel(label, color=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color="0.5")


def bar_label(value: float) -> str:
    """Return a time in milliseconds to three digits, or without a point."""
    return f" {value:.0f}" if value >= 100 else f" {value:.3g}"


def _draw_decode(axes: Any, case: CaseResult) -> None:
    for name, times in case.times.items():
        spreads = {length: Spread.of(values) for length, values in times.decode_ms.items()}
        medians = [spread.median for spread in spreads.values()]
        axes.plot(
            list(spreads), medians, "o-", color=subject_colour(name), label=name, linewidth=2,
            markersize=5,
        )  # fmt: skip
        lows = [spread.low for spread in spreads.values()]
        highs = [spread.high for spread in spreads.values()]
        axes.vlines(list(spreads), lows, highs, color=subject_colour(name), linewidth=1)
    axes.set_ylim(0)
    axes.set_xticks(list(next(iter(case.times.values())).decode_ms))
    axes.set_xlabel("generated tokens in the caches", color=_MUTED)
    axes.set_ylabel("decode step, ms", color=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color="0.5")
