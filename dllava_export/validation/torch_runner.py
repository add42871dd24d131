"""A bundle's checkpoint in PyTorch as a polygraphy runner, with the outputs of a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dllava_export.sparsity import Sparsity
from dllava_export.validation import outputs as out
from dllava_export.validation.conversation import (
    IMAGE_FEATURES,
    INPUT_IDS,
    OUTPUT_IDS,
    PIXEL_VALUES,
)
from dllava_export.validation.masked_model import Forward, MaskedModel, Rows, Selection
from dllava_export.validation.session_runner import ConversationRunner

__all__ = ["TorchRunner"]

Outputs = dict[str, np.ndarray]


class TorchRunner(ConversationRunner):
    """A conversation through masked forward passes.

    Args:
        name: For people.
        feed: A conversation, whose names and types are the runner's inputs.
        load_model: Gives the model, when the runner is activated.
        sparsity: The bundle's.
        layers: Put out what every layer computes.
    """

    def __init__(
        self,
        name: str,
        feed: Mapping[str, np.ndarray],
        load_model: Callable[[], MaskedModel],
        sparsity: Sparsity,
        *,
        layers: bool,
    ) -> None:
        super().__init__(name, feed)
        self._load_model = load_model
        self._sparsity = sparsity
        self._layers = layers

    def activate_impl(self) -> None:
        """Load the weights."""
        self._model = self._load_model()

    def deactivate_impl(self) -> None:
        """Let the weights go."""
        del self._model

    def converse(self, feed: Mapping[str, np.ndarray]) -> Outputs:
        """Run prompt and answer in one pass; once more with the rows that recompute keeps."""
        rows = self._model.rows(
            feed[INPUT_IDS][0],
            feed[OUTPUT_IDS][0],
            feed.get(PIXEL_VALUES),
            feed.get(IMAGE_FEATURES),
        )
        forward, selection = self._model.forward(rows, None)
        found: Outputs = {}
        if PIXEL_VALUES in feed:
            assert rows.image_features is not None
            found[out.output(out.VISUAL, out.IMAGE_FEATURES)] = rows.image_features
        found.update(self._prefill(rows, forward, selection))
        for step in range(len(rows.embeds) - rows.num_prompt):
            found.update(self._decode(step, rows, forward, selection))
        if self._layers:
            found.update(self._caches(out.CACHE, forward, selection.kept, len(rows.embeds)))
        found.update(self._recompute(rows, selection))
        return found

    def _prefill(self, rows: Rows, forward: Forward, selection: Selection) -> Outputs:
        stage, end = out.PREFILL, rows.num_prompt
        kept = np.flatnonzero(selection.kept[:end])
        found = {
            out.output(stage, out.KEPT_INDICES): kept,
            out.output(stage, out.CACHE_LENGTHS): self._lengths(end, len(kept)),
            out.output(stage, out.LOGITS): forward.logits[end - 1],
        }
        if selection.image_scores is not None:
            found[out.output(stage, out.IMAGE_SCORES)] = selection.image_scores
        if self._layers:
            found.update(self._hidden_states(stage, forward, selection.kept[:end]))
            found.update(self._caches(stage, forward, selection.kept, end))
        return found

    def _decode(
        self, step: int, rows: Rows, forward: Forward, selection: Selection
    ) -> Outputs:
        stage, row = out.decode(step), rows.num_prompt + step
        stored = int(selection.kept[: row + 1].sum())
        found = {
            out.output(stage, out.KEEP): selection.kept[row : row + 1],
            out.output(stage, out.CACHE_LENGTHS): self._lengths(row + 1, stored),
            out.output(stage, out.LOGITS): forward.logits[row],
        }
        if selection.keep_margin is not None:
            margin = selection.keep_margin[step : step + 1]
            found[out.output(stage, out.KEEP_MARGIN)] = margin
        if self._layers:
            for index, states in enumerate(forward.hidden_states):
                name = out.layer(stage, index, out.HIDDEN_STATES)
                found[name] = states[row : row + 1]
        return found

    def _recompute(self, rows: Rows, selection: Selection) -> Outputs:
        stage = out.RECOMPUTE
        kept = _recomputed_rows(rows, selection)
        forward, _ = self._model.forward(rows, kept)
        found = {
            out.output(stage, out.LOGITS): forward.logits[-1],
            out.output(stage, out.NUM_ROWS): np.array([kept.sum()], np.int64),
            out.output(stage, out.KEPT_ROWS): np.flatnonzero(kept),
        }
        if self._layers:
            found.update(self._hidden_states(stage, forward, kept))
        return found

    def _lengths(self, num_full: int, num_sparse: int) -> np.ndarray:
        num_layers = self._model.num_layers
        full = num_layers if self._sparsity.is_dense else self._sparsity.sparse_layer
        return np.array([num_full] * full + [num_sparse] * (num_layers - full), np.int64)

    def _rows_of(self, layer: int, kept: np.ndarray) -> np.ndarray:
        is_full = self._sparsity.is_dense or layer < self._sparsity.sparse_layer
        return np.arange(len(kept)) if is_full else np.flatnonzero(kept)

    def _hidden_states(self, stage: str, forward: Forward, kept: np.ndarray) -> Outputs:
        return {
            out.layer(stage, i, out.HIDDEN_STATES): states[self._rows_of(i, kept)]
            for i, states in enumerate(forward.hidden_states)
        }

    def _caches(self, stage: str, forward: Forward, kept: np.ndarray, end: int) -> Outputs:
        return {
            out.layer(stage, i, part): rows[self._rows_of(i, kept[:end])]
            for part, layers in (("key", forward.keys), ("value", forward.values))
            for i, rows in enumerate(layers)
        }


def _recomputed_rows(rows: Rows, selection: Selection) -> np.ndarray:
    """Return which rows recompute keeps, [rows] bool.

    Of the answer's rows but the last, as many stay as have a positive decision: those with the
    best scores.
    """
    kept = selection.kept.copy()
    if selection.keep_margin is None:
        return kept
    assert selection.text_scores is not None
    candidates, margin = selection.text_scores[:-1], selection.keep_margin[:-1]
    best = np.argsort(-candidates, kind="stable")[: int((margin > 0).sum())]
    kept[rows.num_prompt : -1] = np.isin(np.arange(len(candidates)), best)
    kept[-1] = True
    return kept
