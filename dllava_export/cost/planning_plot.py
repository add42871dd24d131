"""Draw a memory plan: what the memory holds, and how it grows with the batch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dllava_export import names
from dllava_export.cost.planning import RUNTIME_BYTES, MemoryEstimate, MemoryPlan
from dllava_export.reporting.byte_sizes import byte_unit, format_bytes
from dllava_export.reporting.output_files import check_plot_format, save_plot

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["plot_plan"]

_INK, _MUTED = "0.15", "0.4"
_DENSE, _SPARSE, _LIMIT = "#8a919e", "#2a6fbb", "#c0392b"
_COLOURS = ("#d9dce1", "#b4bac4", "#9cc3e8", "#2a6fbb", "#e9a23b", "#f4d9a8")
_MIN_LABEL_SHARE = 0.045  # of the axis: a label in a lower segment would not fit


def plot_plan(plan: MemoryPlan, path: str | os.PathLike[str]) -> None:
    """Draw stacked memory of the planned batch, and memory against batch size.

    The file appears under its name only when it is complete.

    Args:
        plan: What to draw.
        path: Where to; the suffix .png, .svg or .pdf gives the format.

    Raises:
        SettingError: If the suffix is another.
    """
    check_plot_format(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(1, 1.25))
    unit, size = byte_unit(plan.request.gpu_memory)
    _draw_bars(bars, plan, size)
    _draw_batches(lines, plan, size)
    for axes, title in ((bars, f"Batch {plan.request.batch_size}"), (lines, "Largest batch")):
        axes.set_title(title, loc="left", fontweight="bold", color=_INK)
        axes.set_ylabel(f"{unit} of GPU memory")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=3, color="0.5")
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="0.92")
    request = plan.request
    figure.suptitle(
        f"{request.max_input_len} prompt tokens, {request.image_tokens} of them of an image, "
        f"{request.max_new_tokens} new ones; GPU with {format_bytes(request.gpu_memory)}",
        x=0.01,
        ha="left",
        fontsize=10,
        color="0.3",
    )
    save_plot(figure, path)


def _segments(estimate: MemoryEstimate) -> list[tuple[str, int]]:
    """Return what a bar is made of, from below."""
    return [
        ("weights", estimate.weights),
        ("CUDA context, kernels", RUNTIME_BYTES),
        *((f"KV cache, {name} layers", estimate.group_bytes(name)) for name in names.GROUPS),
        ("activations", estimate.activations),
        ("inputs and outputs", estimate.buffers),
    ]


def _draw_bars(axes: Any, plan: MemoryPlan, unit: int) -> None:
    sides = [_segments(plan.dense), _segments(plan.sparse)]
    limit = plan.request.gpu_memory / unit
    top = 1.12 * max(limit, plan.dense.total / unit, plan.sparse.total / unit)
    bottoms = [0.0, 0.0]
    for parts, colour in zip(zip(*sides, strict=True), _COLOURS, strict=True):
        heights = [num_bytes / unit for _, num_bytes in parts]
        axes.bar(
            (0, 1), heights, 0.62, bottoms, color=colour, edgecolor="white", linewidth=0.8,
            label=parts[0][0],
        )  # fmt: skip
        for place, height in enumerate(heights):
            if height >= _MIN_LABEL_SHARE * top:
                middle = bottoms[place] + height / 2
                axes.text(
                    place, middle, format_bytes(height * unit), ha="center", va="center",
                    fontsize=8.5, color="white" if colour == _SPARSE else _INK,
                )  # fmt: skip
            bottoms[place] += height
    for place, total in enumerate(bottoms):
        axes.text(
            place, total + 0.012 * top, format_bytes(total * unit), ha="center", va="bottom",
            fontsize=9.5, fontweight="bold", color=_INK,
        )  # fmt: skip
    axes.axhline(limit, color=_LIMIT, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set_xticks((0, 1), ("dense", "sparse"))
    axes.set_xlim(-0.55, 1.55)
    axes.set_ylim(0, top)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2,
        frameon=False, fontsize=8.5, labelcolor=_INK,
    )  # fmt: skip


def _draw_batches(axes: Any, plan: MemoryPlan, unit: int) -> None:
    from matplotlib.ticker import MaxNLocator

    sides: Sequence[tuple[str, MemoryEstimate, str]] = (
        ("dense", plan.dense, _DENSE),
        ("sparse", plan.sparse, _SPARSE),
    )
    limit = plan.request.gpu_memory / unit
    last = 1.15 * max(plan.dense.largest_batch, plan.sparse.largest_batch, 1)
    for name, estimate, colour in sides:
        ends = [(estimate.fixed + n * estimate.per_sample) / unit for n in (0, last)]
        batch = estimate.largest_batch
        axes.plot((0, last), ends, color=colour, linewidth=2.2, label=f"{name}: {batch}")
        if batch:
            height = (estimate.fixed + batch * estimate.per_sample) / unit
            axes.plot(batch, height, "o", color=colour, markersize=7, markeredgecolor="white")
            axes.vlines(batch, 0, height, color=colour, linewidth=1, linestyle=(0, (1, 2)))
    axes.axhline(limit, color=_LIMIT, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.text(
        0.01 * last, limit, format_bytes(plan.request.gpu_memory), ha="left", va="bottom",
        fontsize=9, color=_LIMIT,
    )  # fmt: skip
    axes.set_xlim(0, last)
    axes.set_ylim(0, 1.12 * limit)
    axes.set_xlabel("batch size", color=_MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=2,
        frameon=False,
        labelcolor=_INK,
    )
