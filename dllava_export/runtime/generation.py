"""The generation loop: from prompts to text, with and without a KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export.errors import InvalidInputError
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.tokenizer import StreamDecoder
from dllava_export.runtime.results import Generation, OnToken
from dllava_export.runtime.sampling import Sampler

if TYPE_CHECKING:
    from dllava_export.prompts.reader import Prompts
    from dllava_export.runtime.session import Session


__all__ = ["MODES", "generate"]

MODES = ("cache", "recompute")


def generate(
    session: Session,
    images: Sequence[Any] | None,
    prompts: Sequence[str] | None,
    *,
    input_ids: Prompts | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    mode: str,
    on_token: OnToken | None,
) -> list[Generation]:
    """Answer a batch of prompts; see `Session.generate`."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    sampler = Sampler(temperature, top_p, seed)
    ids = _prompt_ids(session, images, prompts, input_ids)
    given = [image for image in images or () if image is not None]
    pixels = session.image_processor(given) if given else None
    run = _CachedRun if mode == "cache" else _RecomputeRun
    loop = _Loop(session, sampler, on_token, len(ids), max_new_tokens)
    return loop.finish(run(session, ids, pixels, max_new_tokens))


def _prompt_ids(
    session: Session,
    images: Sequence[Any] | None,
    prompts: Sequence[str] | None,
    input_ids: Prompts | None,
) -> list[np.ndarray]:
    if (prompts is None) == (input_ids is None):
        raise InvalidInputError("Give either prompts or input_ids, one of the two.")
    if isinstance(prompts, str):
        raise InvalidInputError("prompts is one string, expected a list with one per sample.")
    count = len(prompts if prompts is not None else input_ids or ())
    if images is not None and len(images) != count:
        raise InvalidInputError(
            f"{len(images)} images were given for {count} prompts; expected one image, or None, "
            "for each prompt."
        )
    has_image = (
        [image is not None for image in images] if images is not None else [False] * count
    )
    if prompts is not None:
        tokenizer = session.tokenizer
        return [
            tokenizer.encode(tokenizer.render(prompt, with_image=with_image))
            for prompt, with_image in zip(prompts, has_image, strict=True)
        ]
    ids = session.normalised_prompts(input_ids if input_ids is not None else [])
    for sample, (row, with_image) in enumerate(zip(ids, has_image, strict=True)):
        if bool((row == IMAGE_PLACEHOLDER_ID).any()) != with_image:
            found, wanted = ("no", "an") if with_image else ("an", "no")
            raise InvalidInputError(
                f"Prompt {sample} has {found} image placeholder ({IMAGE_PLACEHOLDER_ID}), but "
                f"{wanted} image was given with it. Give both or neither."
            )
    return ids


class _Loop:
    """Samples, streams and decides who is finished; a run supplies logits."""

    def __init__(
        self,
        session: Session,
        sampler: Sampler,
        on_token: OnToken | None,
        batch: int,
        max_new_tokens: int,
    ) -> None:
        self._sampler = sampler
        self._on_token = on_token
        self._max_new_tokens = max_new_tokens
        self._eos = set(session.eos_token_ids)
        has_tokenizer = session.manifest.chat_template is not None
        self._decoders: list[StreamDecoder | None] = [
            session.tokenizer.stream_decoder() if has_tokenizer else None for _ in range(batch)
        ]
        self.results = [Generation() for _ in range(batch)]
        self.active = np.ones(batch, bool)

    def finish(self, run: _CachedRun | _RecomputeRun) -> list[Generation]:
        """Generate until every sample is finished."""
        start = time.perf_counter()
        logits = run.start(self.results)
        prefill_seconds = time.perf_counter() - start
        start = time.perf_counter()
        while True:
            tokens = self._sampler.sample(logits)
            self._accept(tokens)
            self.active &= ~run.is_full
            if not self.active.any():
                break
            logits = run.step(tokens, self.active, self.results)
        decode_seconds = time.perf_counter() - start
        for result, decoder in zip(self.results, self._decoders, strict=True):
            result.text += decoder.flush() if decoder is not None else ""
            result.prefill_seconds, result.decode_seconds = prefill_seconds, decode_seconds
        return self.results

    def _accept(self, tokens: np.ndarray) -> None:
        for sample in np.flatnonzero(self.active):
            result, token = self.results[sample], int(tokens[sample])
            if token in self._eos:
                result.finish_reason = "stop"
                self.active[sample] = False
                continue
            result.token_ids.append(token)
            decoder = self._decoders[sample]
            text = decoder.push(token) if decoder is not None else ""
            result.text += text
            if self._on_token is not None:
                self._on_token(int(sample), token, text)
            self.active[sample] = len(result.token_ids) < self._max_new_tokens


class _CachedRun:
    """Prefill, then one decode step per token."""

    def __init__(
        self, session: Session, ids: list[np.ndarray], pixels: np.ndarray | None, num_new: int
    ) -> None:
        self._session = session
        self._ids, self._pixels, self._num_new = ids, pixels, num_new

    def start(self, results: list[Generation]) -> np.ndarray:
        session = self._session
        prefill = session.prefill(self._ids, self._pixels, max_new_tokens=self._num_new)
        num_image_tokens = session.manifest.geometry.num_image_tokens
        for sample, result in enumerate(results):
            result.num_prompt_tokens = int(prefill.cache_lengths[0, sample])
            kept = int((prefill.kept_image_indices[sample] >= 0).sum())
            result.num_kept_image_tokens = kept
            result.num_image_tokens = num_image_tokens if kept else 0
        return prefill.logits

    @property
    def is_full(self) -> np.ndarray:
        return self._session.is_full

    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
        decoded = self._session.decode(tokens, active=active)
        for sample in np.flatnonzero(active):
            results[sample].num_fed_tokens += 1
            results[sample].num_kept_tokens += int(decoded.keep[sample])
            results[sample].num_forced_drops += int(decoded.forced[sample])
        return decoded.logits


class _RecomputeRun:
    """The whole sequence anew for every token; the image is encoded once."""

    def __init__(
        self, session: Session, ids: list[np.ndarray], pixels: np.ndarray | None, num_new: int
    ) -> None:
        self._session = session
        self._ids = ids
        self._features = session.encode_images(pixels) if pixels is not None else None
        self._outputs = np.zeros((len(ids), 0), np.int64)
        self._prompt_rows = np.zeros(len(ids), np.int64)

    def start(self, results: list[Generation]) -> np.ndarray:
        session = self._session
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
        room = self._session.max_length - self._outputs.shape[1]
        images = self._session.manifest.geometry.num_image_tokens
        lengths = [
            len(ids) + (images - 1) * (IMAGE_PLACEHOLDER_ID in ids) for ids in self._ids
        ]
        return np.array(lengths) >= room

    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
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
