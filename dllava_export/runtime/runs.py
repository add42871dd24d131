"""What gives a generation its logits: a prefill and steps, a further prompt, or whole passes."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.token_ids import CheckedPrompts
from dllava_export.runtime.results import DecodeResult, Generation, PrefillResult

if TYPE_CHECKING:
    from dllava_export.runtime.decoding import DecodingSession

__all__ = ["MODES", "CachedRun", "ExtendedRun", "RecomputeRun", "Run", "start_run"]


class Run(abc.ABC):
    """Gives the logits of a batch, token after token."""

    batch: int

    @property
    @abc.abstractmethod
    def prompts(self) -> list[np.ndarray]:
        """What each answer follows, [t] int64 token ids; complete once it has started."""

    @abc.abstractmethod
    def start(self, results: list[Generation]) -> np.ndarray:
        """Return the first logits, [batch, vocab_size] float32; note counts in the results."""

    @property
    @abc.abstractmethod
    def is_full(self) -> np.ndarray:
        """[batch] bool, true where no further token fits."""

    @abc.abstractmethod
    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
        """Feed tokens [batch] int64 of the active samples; return the next logits."""


class CachedRun(Run):
    """Prefill, then one decode step per token."""

    def __init__(
        self,
        session: DecodingSession,
        ids: CheckedPrompts,
        pixels: np.ndarray | None,
        num_new: int,
    ) -> None:
        self.batch = len(ids)
        self._session = session
        self._ids, self._pixels, self._num_new = ids, pixels, num_new

    @property
    def prompts(self) -> list[np.ndarray]:
        """See `Run`."""
        return self._ids

    def start(self, results: list[Generation]) -> np.ndarray:
        """Prefill."""
        prefill = self.prefill()
        num_image_tokens = self._session.manifest.geometry.num_image_tokens
        for sample, result in enumerate(results):
            result.num_prompt_tokens = int(prefill.cache_lengths[0, sample])
            kept = int((prefill.kept_image_indices[sample] >= 0).sum())
            result.num_kept_image_tokens = kept
            result.num_image_tokens = num_image_tokens if kept else 0
        return prefill.logits

    def prefill(self) -> PrefillResult:
        """Feed the prompts; a subclass may look at what comes back."""
        return self._session.prefill(self._ids, self._pixels, max_new_tokens=self._num_new)

    def decode(self, tokens: np.ndarray, active: np.ndarray) -> DecodeResult:
        """Feed a token of each active sample; a subclass may look at what comes back."""
        return self._session.decode(tokens, active=active)

    @property
    def is_full(self) -> np.ndarray:
        """See `Run`."""
        return self._session.is_full

    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
        """Decode."""
        decoded = self.decode(tokens, active)
        for sample in np.flatnonzero(active):
            results[sample].num_fed_tokens += 1
            results[sample].num_kept_tokens += int(decoded.keep[sample])
            results[sample].num_forced_drops += int(decoded.forced[sample])
        return decoded.logits


class ExtendedRun(CachedRun):
    """A further prompt on top of the caches, then one decode step per token."""

    def __init__(self, session: DecodingSession, ids: np.ndarray) -> None:
        super().__init__(session, CheckedPrompts([ids]), None, 0)

    def start(self, results: list[Generation]) -> np.ndarray:
        """Feed the prompt."""
        results[0].num_prompt_tokens = len(self._ids[0])
        return self._session.extend(self._ids).logits


class RecomputeRun(Run):
    """The whole sequence anew for every token; the image is encoded once."""

    def __init__(
        self,
        session: DecodingSession,
        ids: CheckedPrompts,
        pixels: np.ndarray | None,
        num_new: int,
    ) -> None:
        self.batch = len(ids)
        self._session = session
        self._ids, self._pixels = ids, pixels
        self._features: np.ndarray | None = None
        self._outputs = np.zeros((len(ids), 0), np.int64)
        self._prompt_rows = np.zeros(len(ids), np.int64)

    @property
    def prompts(self) -> list[np.ndarray]:
        """See `Run`."""
        return self._ids

    def start(self, results: list[Generation]) -> np.ndarray:
        """Encode the image and run the prompt."""
        session = self._session
        if self._pixels is not None:
            self._features = session.encode_images(self._pixels)
        num_image_tokens = session.manifest.geometry.num_image_tokens
        num_kept = session.manifest.sparsity.num_kept_image_tokens(num_image_tokens)
        for ids, result in zip(self._ids, results, strict=True):
            has_image = bool((ids == IMAGE_PLACEHOLDER_ID).any())
            result.num_image_tokens = num_image_tokens if has_image else 0
            result.num_kept_image_tokens = num_kept if has_image else 0
            result.num_prompt_tokens = len(ids) - has_image + result.num_image_tokens
        logits, self._prompt_rows = self._pass()
        return logits

    @property
    def is_full(self) -> np.ndarray:
        """See `Run`."""
        room = self._session.max_length - self._outputs.shape[1]
        images = self._session.manifest.geometry.num_image_tokens
        lengths = [
            len(ids) + (images - 1) * (IMAGE_PLACEHOLDER_ID in ids) for ids in self._ids
        ]
        return np.array(lengths) >= room

    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
        """Run prompt and answer so far."""
        self._outputs = np.concatenate([self._outputs, tokens[:, None]], axis=1)
        logits, num_rows = self._pass()
        for sample in np.flatnonzero(active):
            results[sample].num_fed_tokens += 1
            results[sample].num_kept_tokens = int(num_rows[sample] - self._prompt_rows[sample])
        return logits

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        result = self._session.recompute(
            self._ids, None, self._outputs, image_features=self._features
        )
        return result.logits, result.num_rows


_RUNS: dict[str, type[CachedRun | RecomputeRun]] = {
    "cache": CachedRun,
    "recompute": RecomputeRun,
}
MODES = tuple(_RUNS)


def start_run(
    session: DecodingSession,
    ids: CheckedPrompts,
    images: Sequence[Any] | None,
    max_new_tokens: int,
    mode: str = "cache",
) -> Run:
    """Return what computes the answers to prompts from `prompt_ids`.

    Args:
        session: Runs the graphs.
        ids: Prompts, [t] int64 each.
        images: One for each prompt, or None where it has none.
        max_new_tokens: Tokens that will follow at most; sizes the caches.
        mode: One of `MODES`.
    """
    given = [] if images is None else [image for image in images if image is not None]
    pixels = session.image_processor(given) if given else None
    return _RUNS[mode](session, ids, pixels, max_new_tokens)
