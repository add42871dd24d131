"""Show what a bundle keeps: patches and their scores, generated tokens, KV cache lengths.

`trace_answer` computes everything, `draw` only draws.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export import bundle, names
from dllava_export.chat import IMAGE_PLACEHOLDER_ID
from dllava_export.errors import InvalidInputError
from dllava_export.kv_plan import SPARE_ROWS

if TYPE_CHECKING:
    import onnx

    from dllava_export.session import Session

__all__ = [
    "AnswerTrace",
    "PlacedText",
    "check_format",
    "draw",
    "image_scores",
    "place_tokens",
    "trace_answer",
]

_FORMATS = ("png", "svg", "pdf")

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
class AnswerTrace:
    """One greedy answer, and what was kept on the way.

    Attributes:
        manifest: The bundle's.
        name: The bundle's folder.
        question: The prompt, or its token ids as text.
        picture: [size, size, 3] float32 in [0, 1] as the model sees it; None without an image.
        kept_image_indices: [k] int64, ascending; all in a dense decoder, none without an image.
        scores: [num_image_tokens] float32 of the image policy; None in a dense decoder and
            without an image.
        pieces: Text of each generated token; ids without a tokenizer.
        keep: [num_fed] bool, for the generated tokens that were fed back: all but the last one
            where the answer was cut off.
        lengths: [num_fed + 1, layers] int64, valid cache rows after the prompt and each token.
    """

    manifest: bundle.Manifest
    name: str
    question: str
    picture: np.ndarray | None
    kept_image_indices: np.ndarray
    scores: np.ndarray | None
    pieces: tuple[str, ...]
    keep: np.ndarray
    lengths: np.ndarray

    @property
    def grid(self) -> int:
        """Patches on each side of the picture."""
        return math.isqrt(self.manifest.geometry.num_image_tokens)

    @property
    def kept_patches(self) -> np.ndarray:
        """[grid, grid] bool, row by row from the top left."""
        kept = np.zeros(self.grid**2, bool)
        kept[self.kept_image_indices] = True
        return kept.reshape(self.grid, self.grid)

    @property
    def kv_share(self) -> float:
        """KV bytes at the end over those of a dense decoder."""
        rows = self.lengths[-1]
        return float(rows.sum() / (rows[0] * len(rows)))


def trace_answer(
    folder: str | Path,
    *,
    image: str | None = None,
    prompt: str | None = None,
    input_ids: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    backend: str = "onnxruntime",
    provider: str | None = None,
    num_threads: int | None = None,
) -> AnswerTrace:
    """Answer a prompt greedily and remember what was kept.

    Args:
        folder: The bundle.
        image: A picture, or `none` for a text-only prompt.
        prompt: The question; the bundle's chat template is put around it.
        input_ids: Token ids instead of `prompt`, -200 for the image.
        max_new_tokens: Tokens generated at most.
        backend: As `load` takes it. Scores always come from ONNX Runtime on the CPU.
        provider: As `load` takes it.
        num_threads: Threads of ONNX Runtime; its own default where None.

    Raises:
        BackendError: If the backend cannot run the bundle.
        InvalidInputError: If prompt and image do not fit the bundle or each other.
        CapacityError: If the prompt is too long.
        ValueError: If `max_new_tokens` is not positive.
    """
    from dllava_export.session import check_image_choice, load

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if (prompt is None) == (input_ids is None):
        raise InvalidInputError("Give either prompt or input_ids, one of the two.")
    folder = Path(folder)
    session = load(folder, backend, provider=provider, num_threads=num_threads)
    manifest = session.manifest
    picture = check_image_choice(manifest, image)
    if picture is not None:
        _check_grid(manifest)
    if prompt is not None:
        tokenizer = session.tokenizer
        text = tokenizer.render(prompt, with_image=picture is not None)
        ids, question = tokenizer.encode(text), prompt
    else:
        (ids,) = session.normalised_prompts([np.asarray(input_ids, np.int64)])
        question = " ".join(
            "<image>" if i == IMAGE_PLACEHOLDER_ID else str(i) for i in ids.tolist()
        )
    pixels = features = None
    if picture is not None:
        pixels = session.image_processor([picture])
        features = session.encode_images(pixels)
    prefill = session.prefill([ids], image_features=features, max_new_tokens=max_new_tokens)
    kept = prefill.kept_image_indices[0]
    tokens, keep, lengths = _generate(session, prefill.logits, max_new_tokens)
    scores = None
    if features is not None and not manifest.sparsity.is_dense:
        scores = image_scores(folder, manifest, ids, features, num_threads=num_threads)
    return AnswerTrace(
        manifest=manifest,
        name=folder.resolve().name,
        question=question,
        picture=None if pixels is None else _visible(pixels[0], session.image_processor),
        kept_image_indices=kept[kept >= 0],
        scores=scores,
        pieces=tuple(_pieces(session, tokens)),
        keep=np.array(keep, bool),
        lengths=np.stack([prefill.cache_lengths[:, 0], *lengths]),
    )


def image_scores(
    folder: Path,
    manifest: bundle.Manifest,
    input_ids: np.ndarray,
    image_features: np.ndarray,
    *,
    num_threads: int | None = None,
) -> np.ndarray:
    """Return the scores by which the decoder chooses image tokens.

    Only the layers below `sparse_layer` and the policy are run.

    Args:
        folder: A bundle that is not dense.
        manifest: Its manifest.
        input_ids: [t] int64 with one -200.
        image_features: [1, num_image_tokens, hidden_size].
        num_threads: Threads of ONNX Runtime; its own default where None.

    Returns:
        [num_image_tokens] float32, higher is kept. Log-probabilities of `keep` for policy
        predictor.
    """
    from dllava_export.ort_backend import lowered_model, open_session
    from dllava_export.prompt_rows import assemble_prompt
    from dllava_export.weights import EmbeddingTable

    llm = folder / bundle.LLM_FOLDER
    assert manifest.embedding is not None
    lookup = EmbeddingTable(llm, manifest.embedding).lookup
    rows = assemble_prompt([input_ids], image_features, lookup)
    num_rows, num_image = int(rows.lengths[0]), int(rows.num_image[0])
    num_kept = num_rows - num_image + manifest.sparsity.num_kept_image_tokens(num_image)
    values: dict[str, np.ndarray] = {
        names.INPUTS_EMBEDS: rows.inputs_embeds,
        names.POSITION_IDS: rows.position_ids,
        names.TOKEN_KIND: rows.token_kind,
        names.NUM_KEPT: np.array([num_kept]),
        names.KEPT_LENGTHS: np.array([num_kept]),
        names.NUM_IMAGE_ROWS: rows.num_image,
        names.WRITE_INDEX_FULL: np.zeros(1, np.int64),
    }
    graph = lowered_model(_score_graph(llm / bundle.DECODER))
    scorer = open_session(graph, folder=llm, num_threads=num_threads)
    geometry = manifest.geometry
    cache = (1, geometry.num_kv_heads, num_rows + SPARE_ROWS, geometry.head_dim)
    feeds = {
        entry.name: values[entry.name]
        if entry.name in values
        else np.zeros(cache, rows.inputs_embeds.dtype)
        for entry in scorer.get_inputs()
    }
    (scores,) = scorer.run(None, feeds)
    start = int(rows.image_start[0])
    return scores[0, start : start + num_image]


def _score_graph(path: Path) -> onnx.ModelProto:
    """Cut a decoder off behind the scores of its image selection."""
    import onnx

    from dllava_export.passes import graph_from_model, model_from_graph
    from dllava_export.passes.insert_image_selection import find_image_selection

    graph = graph_from_model(onnx.load(path, load_external_data=False))
    selection = find_image_selection(graph)
    assert selection is not None
    (node,) = selection.kept_indices.inputs
    graph.outputs = [node.inputs[0]]
    graph.cleanup(remove_unused_graph_inputs=True).toposort()
    return model_from_graph(graph)


def _generate(
    session: Session, logits: np.ndarray, max_new_tokens: int
) -> tuple[list[int], list[bool], list[np.ndarray]]:
    """Return tokens, the keep bits of those fed back, and cache lengths [layers] after each."""
    tokens: list[int] = []
    keep: list[bool] = []
    lengths: list[np.ndarray] = []
    while True:
        token = int(logits[0].argmax())
        if token in session.eos_token_ids:
            return tokens, keep, lengths
        tokens.append(token)
        if len(tokens) == max_new_tokens or session.is_full[0]:
            return tokens, keep, lengths
        step = session.decode([token])
        keep.append(bool(step.keep[0]))
        lengths.append(step.cache_lengths[:, 0])
        logits = step.logits


def _pieces(session: Session, tokens: Sequence[int]) -> list[str]:
    """Return each token's text; one that only starts a character has none."""
    if session.manifest.chat_template is None:
        return [str(token) if i == 0 else f" {token}" for i, token in enumerate(tokens)]
    decoder = session.tokenizer.stream_decoder()
    pieces = [decoder.push(token) for token in tokens]
    return [*pieces[:-1], pieces[-1] + decoder.flush()] if pieces else []


def _visible(pixel_values: np.ndarray, processor: Any) -> np.ndarray:
    """Return pixel values [3, size, size] as a picture [size, size, 3] in [0, 1]."""
    mean, std = np.float32(processor.mean), np.float32(processor.std)
    picture = pixel_values.transpose(1, 2, 0) * std + mean
    return np.clip(picture / (255 * processor.rescale_factor), 0, 1).astype(np.float32)


def _check_grid(manifest: bundle.Manifest) -> None:
    num_image_tokens = manifest.geometry.num_image_tokens
    if math.isqrt(num_image_tokens) ** 2 != num_image_tokens:
        raise InvalidInputError(
            f"An image has {num_image_tokens} tokens in this bundle, expected a square grid of "
            "patches. Use --image none."
        )


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


def check_format(path: str | os.PathLike[str]) -> str:
    """Return the format that a file's suffix stands for.

    Raises:
        ValueError: If there is no such format.
    """
    suffix = Path(path).suffix
    if suffix[1:].lower() not in _FORMATS:
        raise ValueError(
            f"Figure {path} has suffix {suffix!r}, expected one of "
            f"{', '.join('.' + name for name in _FORMATS)}. Change the file name."
        )
    return suffix[1:].lower()


def draw(trace: AnswerTrace, path: str | os.PathLike[str]) -> None:
    """Draw a trace. The file appears under its name only when it is complete.

    Args:
        trace: What to draw.
        path: Where to; the suffix .png, .svg or .pdf gives the format.

    Raises:
        ValueError: If the suffix is another.
        InvalidInputError: If the file cannot be written.
    """
    import warnings

    path = Path(path)
    file_format = check_format(path)
    figure = _Page(trace).figure
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with warnings.catch_warnings():
            # Characters that the font lacks are drawn as boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            figure.savefig(temporary, format=file_format)
        temporary.replace(path)
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be written ({error.strerror}). Choose a file you may write."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


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
        is_predictor = trace.manifest.sparsity.policy == "predictor"
        title = "Scores: log-probability to keep" if is_predictor else "Scores"
        self._draw_title(title, top - 0.28, left)
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
        f"policy {sparsity.policy}, from layer {sparsity.sparse_layer} on; KV cache at the end: "
        f"{trace.kv_share:.0%} of dense"
    )
