"""A bundle's session as a polygraphy runner: one inference is one whole conversation."""

from __future__ import annotations

import abc
import collections
import time
from collections.abc import Callable, Mapping

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from dllava_export import names
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.runtime.results import DecodeResult, PrefillResult
from dllava_export.runtime.session import Session
from dllava_export.validation import outputs as out
from dllava_export.validation.conversation import (
    IMAGE_FEATURES,
    INPUT_IDS,
    OUTPUT_IDS,
    PIXEL_VALUES,
)
from dllava_export.validation.graph_backend import GraphBackend
from dllava_export.validation.marked_graphs import MarkedModel

__all__ = ["ConversationRunner", "SessionRunner"]

Outputs = dict[str, np.ndarray]


class ConversationRunner(BaseRunner, abc.ABC):
    """What all runners of conversations share: named inputs, timing.

    Args:
        name: For people.
        feed: A conversation, whose names and types are the runner's inputs.
    """

    def __init__(self, name: str, feed: Mapping[str, np.ndarray]) -> None:
        super().__init__(name=name)
        self._metadata = TensorMetadata()
        for key, value in feed.items():
            shape = (1, *[None] * (value.ndim - 1))
            self._metadata.add(key, dtype=value.dtype, shape=shape)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return names, types and shapes; lengths are free."""
        return self._metadata

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Run the conversation; see `outputs` for the names of what comes back."""
        start = time.perf_counter()
        found = self.converse(feed_dict)
        self.inference_time = time.perf_counter() - start
        return collections.OrderedDict(found)

    @abc.abstractmethod
    def converse(self, feed: Mapping[str, np.ndarray]) -> Outputs:
        """Return all outputs of a conversation by name."""


class SessionRunner(ConversationRunner):
    """A conversation through `Session`, whatever runs the graphs.

    Args:
        name: For people.
        feed: A conversation, whose names and types are the runner's inputs.
        open_session: Gives the session, when the runner is activated, and the backend that
            keeps inner values, or None.
        layers: Put out what every layer cached and, where the backend keeps them, hidden states.
    """

    def __init__(
        self,
        name: str,
        feed: Mapping[str, np.ndarray],
        open_session: Callable[[], tuple[Session, GraphBackend | None]],
        *,
        layers: bool,
    ) -> None:
        super().__init__(name, feed)
        self._open_session = open_session
        self._layers = layers

    def activate_impl(self) -> None:
        """Open the session."""
        self._session, self._graphs = self._open_session()

    def deactivate_impl(self) -> None:
        """Let the session go, with its weights."""
        del self._session, self._graphs

    def converse(self, feed: Mapping[str, np.ndarray]) -> Outputs:
        """Prefill, feed the answer token by token, then recompute it in one pass."""
        session = self._session
        # Drawn at random, or a whole prompt: nothing in it is padding.
        ids = session.normalised_prompts(feed[INPUT_IDS], np.ones_like(feed[INPUT_IDS]))
        answer = feed[OUTPUT_IDS]
        features = feed.get(IMAGE_FEATURES)
        found: Outputs = {}
        if PIXEL_VALUES in feed:
            features = session.encode_images(feed[PIXEL_VALUES])
            found[out.output(out.VISUAL, out.IMAGE_FEATURES)] = features[0]
        prefill = session.prefill(ids, image_features=features, max_new_tokens=answer.shape[1])
        num_image = 0 if features is None else features.shape[1]
        rows = _kept_rows(prefill, ids[0], num_image)
        found.update(self._prefill(prefill, rows, ids[0], num_image))
        for step, token in enumerate(answer[0]):
            found.update(self._decode(session.decode([int(token)]), out.decode(step)))
        if self._layers:
            found.update(self._caches(out.CACHE))
        recomputed = session.recompute(ids, output_ids=answer, image_features=features)
        stage = out.RECOMPUTE
        found[out.output(stage, out.LOGITS)] = recomputed.logits[0]
        found[out.output(stage, out.NUM_ROWS)] = recomputed.num_rows[:1]
        if self._graphs is not None:
            marked = self._graphs.recompute_decoder
            found[out.output(stage, out.KEPT_ROWS)] = self._recomputed_rows(
                marked, len(ids[0]) + max(num_image - 1, 0) + answer.shape[1]
            )[: int(recomputed.num_rows[0])]
            found.update(self._hidden_states(stage, marked))
        return found

    def _prefill(
        self, result: PrefillResult, rows: np.ndarray, ids: np.ndarray, num_image: int
    ) -> Outputs:
        stage = out.PREFILL
        found = {
            out.output(stage, out.KEPT_INDICES): rows,
            out.output(stage, out.CACHE_LENGTHS): result.cache_lengths[:, 0],
            out.output(stage, out.LOGITS): result.logits[0],
        }
        graphs = self._graphs
        if graphs is not None:
            scores = graphs.decoder.image_scores
            if scores is not None and num_image:
                start = int(np.flatnonzero(ids == IMAGE_PLACEHOLDER_ID)[0])
                found[out.output(stage, out.IMAGE_SCORES)] = graphs.inner[scores][
                    0, start : start + num_image
                ]
            found.update(self._hidden_states(stage, graphs.decoder))
        if self._layers:
            found.update(self._caches(stage))
        return found

    def _decode(self, result: DecodeResult, stage: str) -> Outputs:
        # A full cache forces the bit to 0; what is compared is the decision.
        keep = result.keep | result.forced
        found = {
            out.output(stage, out.KEEP): keep[:1],
            out.output(stage, out.FORCED): result.forced[:1],
            out.output(stage, out.CACHE_LENGTHS): result.cache_lengths[:, 0],
            out.output(stage, out.LOGITS): result.logits[0],
        }
        if self._graphs is not None:
            margin = self._graphs.decoder.keep_margin
            if margin is not None:
                found[out.output(stage, out.KEEP_MARGIN)] = self._graphs.inner[margin][0]
            found.update(self._hidden_states(stage, self._graphs.decoder))
        return found

    def _hidden_states(self, stage: str, marked: MarkedModel) -> Outputs:
        assert self._graphs is not None
        inner = self._graphs.inner
        return {
            out.layer(stage, index, out.HIDDEN_STATES): inner[name][0]
            for index, name in marked.hidden_states.items()
        }

    def _caches(self, stage: str) -> Outputs:
        found = {}
        for index, length in enumerate(self._session.cache_lengths[:, 0]):
            for part, cache in zip(("key", "value"), self._session.cache(index), strict=True):
                rows = cache[0, :, :length].swapaxes(0, 1)  # [rows, num_kv_heads, head_dim]
                found[out.layer(stage, index, part)] = rows.reshape(int(length), -1)
        return found

    def _recomputed_rows(self, marked: MarkedModel, num_rows: int) -> np.ndarray:
        """Return the rows that both selections of recompute leave."""
        assert self._graphs is not None
        inner = self._graphs.inner
        rows = np.arange(num_rows)
        for name in (names.KEPT_INDICES, marked.text_indices):
            if name in inner:
                rows = rows[inner[name][0]]
        return rows


def _kept_rows(prefill: PrefillResult, ids: np.ndarray, num_image: int) -> np.ndarray:
    """Return the prompt's rows that went on from `sparse_layer`, ascending."""
    num_text = int((ids != IMAGE_PLACEHOLDER_ID).sum())
    rows = np.arange(num_text + num_image)
    if not num_image:
        return rows
    start = int(np.flatnonzero(ids == IMAGE_PLACEHOLDER_ID)[0])
    is_text = (rows < start) | (rows >= start + num_image)
    kept = prefill.kept_image_indices[0]
    return np.sort(np.concatenate([rows[is_text], start + kept[kept >= 0]]))
