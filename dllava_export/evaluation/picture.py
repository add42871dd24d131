"""Draw what a bundle kept for an answer: patches, scores, tokens, KV cache lengths."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export.passes.policies.registry import POLICIES
from dllava_export.reporting.output_files import save_plot

if TYPE_CHECKING:
    from dllava_export.evaluation.answer_trace import AnswerTrace


__all__ = ["PlacedText", "draw", "place_tokens"]

_INK, _MUTED, _FAINT = "#1f2430", "#6b7280", "#d9dce1"
_BLUE, _PALE_BLUE = "#2a6fbb", "#9db4cf"
# Keep bit → text and background.
_TOKEN_COLOURS = {
    True: ("#12395f", "#cfe2f5"),
    False: ("#b5480f", "#fae3d5"),
    None: (_INK, "#eceef1"),
}

# Inches.
_WIDTH, _MARGIN, _PANEL = 11.0, 0.45, 2.75
_LINE, _FONT_SIZE = 0.235, 9.5
_ADVANCE = 0.602 * _FONT_SIZE / 72  # of a character of DejaVu Sans Mono


@dataclasses.dataclass(frozen=True)
class PlacedText:
    """A part of a token on the page.

    Attributes:
        token: Its token's index.
        line: 0-based.
        column: In characters, 0-based.
        text: Without white space at its ends.
    """

    token: int
    line: int
    column: int
    text: str


def place_tokens(pieces: Sequence[str], num_columns: int) -> list[PlacedText]:
    """Wrap the text of tokens into lines of equally wide characters.

    Lines break before a word, at a line break, and within words longer than a line.

    Args:
        pieces: Text of each token, with the white space that belongs to it.
        num_columns: Characters of a line.
    """
    placed: list[PlacedText] = []
    line = column = 0
    for is_space, parts in _words(pieces):
        length = sum(len(part) for _, part in parts)
        if is_space:
            breaks = sum(part.count("\n") for _, part in parts)
            if breaks:
                line, column = line + breaks, 0
            elif column:  # spaces start no line
                column += length
            continue
        if column and column + length > num_columns:
            line, column = line + 1, 0
        for token, part in parts:
            while part:
                if column == num_columns:
                    line, column = line + 1, 0
                shown = part[: num_columns - column]
                placed.append(PlacedText(token, line, column, shown))
                column, part = column + len(shown), part[len(shown) :]
    return placed


def _words(pieces: Sequence[str]) -> Iterator[tuple[bool, list[tuple[int, str]]]]:
    """Yield words and, true, the white space between them, as (token, part of its text)."""
    parts = [
        (token, "".join(group))
        for token, piece in enumerate(pieces)
        for _, group in itertools.groupby(piece, key=str.isspace)
    ]
    for is_space, group in itertools.groupby(parts, key=lambda part: part[1].isspace()):
        yield is_space, list(group)


def draw(trace: AnswerTrace, path: str | os.PathLike[str]) -> None:
    """Draw a trace. The file appears under its name only when it is complete.

    Args:
        trace: What to draw.
        path: Where to; the suffix .png, .svg or .pdf gives the format.

    Raises:
        SettingError: If the suffix is another.
        InvalidInputError: If the file cannot be written.
    """
    import warnings

    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        save_plot(_Page(trace).figure, path)


class _Page:
    """The figure, laid out in inches from the top left."""

    def __init__(self, trace: AnswerTrace) -> None:
        from matplotlib.figure import Figure

        self._trace = trace
        self._num_columns = int((_WIDTH - 2 * _MARGIN) / _ADVANCE)
        question = place_tokens([trace.question], self._num_columns)
        answer = place_tokens(trace.pieces, self._num_columns)
        heights = [_LINE * (1 + max((p.line for p in part), default=0)) for part in
                   (question, answer)]  # fmt: skip
        panels_top = 0.95
        question_top = panels_top + _PANEL + 0.85
        answer_top = question_top + heights[0] + 0.52
        self._height = answer_top + heights[1] + 0.35
        self.figure = Figure(figsize=(_WIDTH, self._height), dpi=150, facecolor="white")
        self._draw_heading()
        left = _MARGIN
        if trace.picture is not None:
            self._draw_picture(left, panels_top)
            self._draw_scores(left + _PANEL + 0.4, panels_top)
            left += 2 * _PANEL + 1.75
        self._draw_lengths(left, panels_top, _WIDTH - _MARGIN - left)
        self._draw_title("Question", question_top - 0.29)
        self._draw_text(question, question_top)
        self._draw_answer(answer, answer_top)

    def _axes(self, left: float, top: float, width: float, height: float) -> Any:
        bottom = self._height - top - height
        box = (left / _WIDTH, bottom / self._height, width / _WIDTH, height / self._height)
        return self.figure.add_axes(box)

    def _draw_at(self, left: float, top: float, text: str, **style: Any) -> Any:
        return self.figure.text(
            left / _WIDTH, 1 - top / self._height, text, parse_math=False, **style
        )

    def _draw_title(self, text: str, top: float, left: float = _MARGIN) -> None:
        self._draw_at(left, top, text, va="top", fontsize=10.5, fontweight="bold", color=_INK)

    def _draw_heading(self) -> None:
        trace = self._trace
        self._draw_at(
            _MARGIN, 0.18, trace.name, va="top", fontsize=13, fontweight="bold", color=_INK
        )
        self._draw_at(
            _WIDTH - _MARGIN, 0.21, _describe(trace), va="top", ha="right", fontsize=9.5,
            color=_MUTED,
        )  # fmt: skip

    def _draw_picture(self, left: float, top: float) -> None:
        trace = self._trace
        assert trace.picture is not None
        kept = trace.kept_patches
        self._draw_title(f"{kept.sum()} of {kept.size} patches kept", top - 0.28, left)
        axes = self._axes(left, top, _PANEL, _PANEL)
        size = len(trace.picture)
        extent = (-0.5, trace.grid - 0.5, trace.grid - 0.5, -0.5)
        patch_of = np.arange(size) * trace.grid // size
        is_kept = kept[np.ix_(patch_of, patch_of)][..., None]
        grey = trace.picture.mean(axis=-1, keepdims=True)
        dimmed = np.where(is_kept, trace.picture, 0.68 + 0.24 * grey)
        axes.imshow(dimmed, extent=extent, interpolation="nearest")
        self._outline(axes, kept, _INK)
        _bare(axes)

    def _draw_scores(self, left: float, top: float) -> None:
        trace = self._trace
        kept = trace.kept_patches
        if trace.scores is None:
            self._draw_title("No scores", top - 0.28, left)
            axes = self._axes(left, top, _PANEL, _PANEL)
            axes.text(0.5, 0.5, "a dense decoder\nkeeps every patch", ha="center", va="center",
                      color=_MUTED, fontsize=10, transform=axes.transAxes)  # fmt: skip
            axes.set_facecolor("#f5f6f8")
            _bare(axes)
            return
        policy = POLICIES.find(trace.manifest.sparsity.policy)
        meaning = "" if policy is None else policy.score_meaning
        self._draw_title(f"Scores: {meaning}" if meaning else "Scores", top - 0.28, left)
        axes = self._axes(left, top, _PANEL, _PANEL)
        image = axes.imshow(trace.scores.reshape(kept.shape), cmap="viridis")
        self._outline(axes, kept, "white")
        _bare(axes)
        bar_axes = self._axes(left + _PANEL + 0.1, top, 0.12, _PANEL)
        bar = self.figure.colorbar(image, cax=bar_axes)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8, labelcolor=_MUTED, pad=3)

    def _outline(self, axes: Any, kept: np.ndarray, colour: str) -> None:
        """Draw the edges between kept and dropped patches."""
        from matplotlib.collections import LineCollection

        if not kept.all():
            lines = _edges(kept)
            axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.8))

    def _draw_lengths(self, left: float, top: float, width: float) -> None:
        from matplotlib.ticker import MaxNLocator

        trace = self._trace
        self._draw_title("Rows in the KV cache of a layer", top - 0.28, left)
        axes = self._axes(left, top, width, _PANEL)
        steps = np.arange(len(trace.lengths))
        dense = trace.lengths[:, 0]
        num_layers = trace.lengths.shape[1]
        sparsity = trace.manifest.sparsity
        num_full = num_layers if sparsity.is_dense else sparsity.sparse_layer
        style = {"linewidth": 2.2, "solid_capstyle": "round"}
        if len(steps) == 1:
            style["marker"] = "o"
        axes.plot(steps, dense, color=_PALE_BLUE, label=_layers(0, num_full), **style)
        if num_full < num_layers:
            sparse = trace.lengths[:, -1]
            axes.plot(steps, sparse, color=_BLUE, label=_layers(num_full, num_layers), **style)
            axes.fill_between(steps, sparse, dense, color=_FAINT, alpha=0.45, linewidth=0)
            axes.plot(steps, dense, color=_INK, linewidth=1.1, linestyle=(0, (4, 3)),
                      label="every layer, dense")  # fmt: skip
        axes.set_xlim(0, max(steps[-1], 1))
        axes.set_ylim(0, 1.08 * dense[-1])
        axes.set_xlabel("generated tokens fed back", fontsize=9, color=_MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(length=3, color=_FAINT, labelsize=8.5, labelcolor=_MUTED)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="0.94")
        axes.legend(
            frameon=False, fontsize=8.5, labelcolor=_INK, ncols=2, loc="upper right",
            bbox_to_anchor=(1.02, -0.135), handlelength=1.6, columnspacing=1.2,
        )  # fmt: skip

    def _draw_answer(self, placed: Sequence[PlacedText], top: float) -> None:
        trace = self._trace
        num_tokens, num_fed = len(trace.pieces), len(trace.keep)
        noun = "token" if num_tokens == 1 else "tokens"
        self._draw_title(f"Answer, {num_tokens} {noun}", top - 0.32)
        if not num_tokens:
            self._draw_at(_MARGIN, top, "(empty)", va="top", fontsize=_FONT_SIZE, color=_MUTED)
            return
        keep: list[bool | None] = [*trace.keep.tolist(), *[None] * (num_tokens - num_fed)]
        self._draw_text(placed, top, keep)
        left = _WIDTH - _MARGIN
        num_kept = int(trace.keep.sum())
        entries: list[tuple[bool | None, str]] = [
            (True, f"{num_kept} kept"),
            (False, f"{num_fed - num_kept} dropped"),
        ]
        if num_tokens > num_fed:
            entries.append((None, "never fed back"))
        for kept, text in reversed(entries):
            left -= _ADVANCE * len(text)
            self._draw_token(text, left, top - 0.33, kept)
            left -= 0.2

    def _draw_text(
        self,
        placed: Sequence[PlacedText],
        top: float,
        keep: Sequence[bool | None] | None = None,
    ) -> None:
        for part in placed:
            place = _MARGIN + part.column * _ADVANCE, top + part.line * _LINE
            if keep is None:
                self._draw_mono(part.text, *place, _INK)
            else:
                self._draw_token(part.text, *place, keep[part.token])

    def _draw_token(self, text: str, left: float, top: float, kept: bool | None) -> None:
        from matplotlib.patches import Rectangle

        ink, paper = _TOKEN_COLOURS[kept]
        bottom = self._height - top - 0.83 * _LINE
        self.figure.add_artist(
            Rectangle(
                (left / _WIDTH, bottom / self._height),
                (len(text) * _ADVANCE - 0.012) / _WIDTH,
                0.84 * _LINE / self._height,
                transform=self.figure.transFigure,
                facecolor=paper,
                linewidth=0,
            )
        )
        self._draw_mono(text, left, top, ink)

    def _draw_mono(self, text: str, left: float, top: float, colour: str) -> None:
        self._draw_at(
            left, top + 0.62 * _LINE, text, va="baseline", family="DejaVu Sans Mono",
            fontsize=_FONT_SIZE, color=colour,
        )  # fmt: skip


def _edges(kept: np.ndarray) -> list[list[tuple[float, float]]]:
    """Return the borders of kept patches as lines ((x, y), (x, y)) in patch units."""
    padded = np.pad(kept, 1)
    lines = []
    for row, column in zip(*np.nonzero(padded[1:] != padded[:-1]), strict=True):
        y = float(row) - 0.5
        lines.append([(column - 1.5, y), (column - 0.5, y)])
    for row, column in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True):
        x = float(column) - 0.5
        lines.append([(x, row - 1.5), (x, row - 0.5)])
    return lines


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _layers(start: int, end: int) -> str:
    return f"layer {start}" if end == start + 1 else f"layers {start} to {end - 1}"


def _describe(trace: AnswerTrace) -> str:
    sparsity = trace.manifest.sparsity
    if sparsity.is_dense:
        return "dense decoder: nothing is dropped"
    return (
        f"policy {sparsity.policy_text}, from layer {sparsity.sparse_layer} on; KV cache at the "
        f"end: {trace.kv_share:.0%} of dense"
    )
