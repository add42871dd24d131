"""Follow one answer through a bundle: patches and their scores, keep bits, KV cache lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export import names
from dllava_export.backends.kv_plan import SPARE_ROWS
from dllava_export.backends.registry import DEFAULT_BACKEND
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import Manifest
from dllava_export.errors import InvalidInputError
from dllava_export.families.registry import positions_of
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.token_ids import CheckedPrompts, checked_ids
from dllava_export.runtime.generation import GenerationLoop, GenerationSettings
from dllava_export.runtime.results import DecodeResult, Generation, Piece, PrefillResult
from dllava_export.runtime.runs import CachedRun

if TYPE_CHECKING:
    import onnx

    from dllava_export.runtime.session import Session


__all__ = ["AnswerTrace", "image_scores", "trace_answer"]


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

    manifest: Manifest
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
    backend: str = DEFAULT_BACKEND,
    **options: Any,
) -> AnswerTrace:
    """Answer a prompt greedily and remember what was kept.

    Args:
        folder: The bundle.
        image: A picture, or `none` for a text-only prompt.
        prompt: The question; the bundle's chat template is put around it.
        input_ids: Token ids instead of `prompt`, -200 for the image.
        max_new_tokens: Tokens generated at most.
        backend: As `load` takes it. Scores always come from ONNX Runtime on the CPU.
        **options: The backend's own, as `load` takes them.

    Raises:
        BackendError: If the backend cannot run the bundle.
        InvalidInputError: If prompt and image do not fit the bundle or each other.
        CapacityError: If the prompt is too long.
        SettingError: If `max_new_tokens` is not positive.
    """
    from dllava_export.runtime.loading import check_image_choice, load

    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    if (prompt is None) == (input_ids is None):
        raise InvalidInputError("Give either prompt or input_ids, one of the two.")
    folder = Path(folder)
    session = load(folder, backend, **options)
    manifest = session.manifest
    picture = check_image_choice(manifest, image)
    if picture is not None:
        _check_grid(manifest)
    if prompt is not None:
        tokenizer = session.tokenizer
        text = tokenizer.render(prompt, with_image=picture is not None)
        ids, question = tokenizer.encode(text), prompt
    else:
        (ids,) = session.normalised_prompts([checked_ids(input_ids, "input_ids", num_dims=1)])
        question = " ".join(
            "<image>" if i == IMAGE_PLACEHOLDER_ID else str(i) for i in ids.tolist()
        )
    pixels = features = None
    if picture is not None:
        pixels = session.image_processor([picture])
        features = session.encode_images(pixels)
    run = _TracedRun(session, ids, features, max_new_tokens)
    loop = GenerationLoop(session, run, settings)
    # One without a token brings the rest of the text, which `_texts` adds to the last.
    pieces = [piece for piece in loop.pieces() if piece.token_id is not None]
    assert run.prefilled is not None
    kept = run.prefilled.kept_image_indices[0]
    scores = None
    if features is not None and not manifest.sparsity.is_dense:
        scores = image_scores(folder, manifest, ids, features)
    return AnswerTrace(
        manifest=manifest,
        name=folder.resolve().name,
        question=question,
        picture=None if pixels is None else _visible(pixels[0], session.image_processor),
        kept_image_indices=kept[kept >= 0],
        scores=scores,
        pieces=tuple(_texts(session, pieces, loop.results[0])),
        keep=np.array(run.keep, bool),
        lengths=np.stack([run.prefilled.cache_lengths[:, 0], *run.lengths]),
    )


def image_scores(
    folder: Path,
    manifest: Manifest,
    input_ids: np.ndarray,
    image_features: np.ndarray,
) -> np.ndarray:
    """Return the scores by which the decoder chooses image tokens.

    Only the layers below `sparse_layer` and the policy are run.

    Args:
        folder: A bundle that is not dense.
        manifest: Its manifest.
        input_ids: [t] int64 with one -200.
        image_features: [1, num_image_tokens, hidden_size].

    Returns:
        [num_image_tokens] float32, higher is kept. Log-probabilities of `keep` for policy
        predictor.
    """
    from dllava_export.backends.ort.backend import lowered_model, open_session
    from dllava_export.bundles.embedding import EmbeddingTable
    from dllava_export.prompts.rows import assemble_prompt

    llm = folder / layout.LLM_FOLDER
    assert manifest.embedding is not None
    lookup = EmbeddingTable(llm, manifest.embedding).lookup
    positions = positions_of(manifest.family)
    rows = assemble_prompt([input_ids], image_features, lookup, positions)
    num_rows, num_image = int(rows.lengths[0]), int(rows.num_image[0])
    num_kept = num_rows - num_image + manifest.sparsity.num_kept_image_tokens(num_image)
    values: dict[str, np.ndarray] = {
        names.INPUTS_EMBEDS: rows.inputs_embeds,
        names.POSITION_IDS: rows.position_ids,
        names.TOKEN_KIND: rows.token_kind,
        names.NUM_KEPT: np.array([num_kept]),
        names.KEPT_LENGTHS: np.array([num_kept]),
        names.NUM_IMAGE_ROWS: rows.num_image,
        names.write_index(names.FULL): np.zeros(1, np.int64),
    }
    graph = lowered_model(_score_graph(llm / layout.DECODER))
    scorer = open_session(graph, folder=llm)
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

    from dllava_export.passes.graph_io import graph_from_model, model_from_graph
    from dllava_export.passes.insert_image_selection import find_image_selection

    graph = graph_from_model(onnx.load(path, load_external_data=False))
    selection = find_image_selection(graph)
    assert selection is not None
    (node,) = selection.kept_indices.inputs
    graph.outputs = [node.inputs[0]]
    graph.cleanup(remove_unused_graph_inputs=True).toposort()
    return model_from_graph(graph)


class _TracedRun(CachedRun):
    """A generation about given image features that remembers what every step left behind.

    Attributes:
        prefilled: What the prompt gave; None before the start.
        keep: Keep bit of each token that was fed back.
        lengths: [layers] int64 cache lengths after each of them.
    """

    def __init__(
        self, session: Session, ids: np.ndarray, features: np.ndarray | None, num_new: int
    ) -> None:
        super().__init__(session, CheckedPrompts([ids]), None, num_new)
        self._features = features
        self.prefilled: PrefillResult | None = None
        self.keep: list[bool] = []
        self.lengths: list[np.ndarray] = []

    def prefill(self) -> PrefillResult:
        self.prefilled = self._session.prefill(
            self._ids, image_features=self._features, max_new_tokens=self._num_new
        )
        return self.prefilled

    def decode(self, tokens: np.ndarray, active: np.ndarray) -> DecodeResult:
        step = super().decode(tokens, active)
        self.keep.append(bool(step.keep[0]))
        self.lengths.append(step.cache_lengths[:, 0])
        return step


def _texts(session: Session, pieces: Sequence[Piece], answer: Generation) -> list[str]:
    """Return each token's text; one that only starts a character has none."""
    if session.manifest.chat_template is None:
        return [f"{' ' if number else ''}{p.token_id}" for number, p in enumerate(pieces)]
    texts = [piece.text for piece in pieces]
    if texts:  # what is left of a character at the end
        texts[-1] += answer.text[sum(map(len, texts)) :]
    return texts


def _visible(pixel_values: np.ndarray, processor: Any) -> np.ndarray:
    """Return pixel values [3, size, size] as a picture [size, size, 3] in [0, 1]."""
    mean, std = np.float32(processor.mean), np.float32(processor.std)
    picture = pixel_values.transpose(1, 2, 0) * std + mean
    return np.clip(picture / (255 * processor.rescale_factor), 0, 1).astype(np.float32)


def _check_grid(manifest: Manifest) -> None:
    num_image_tokens = manifest.geometry.num_image_tokens
    if math.isqrt(num_image_tokens) ** 2 != num_image_tokens:
        raise InvalidInputError(
            f"An image has {num_image_tokens} tokens in this bundle, expected a square grid of "
            "patches. Use --image none."
        )
