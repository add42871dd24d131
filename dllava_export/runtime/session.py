"""Run a bundle: prefill, decode, further prompts, passes without a cache.

A `Session` keeps the bookkeeping that all backends share: which rows are fed, how long each
cache is, what was kept. A backend only runs graphs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.backends.backend import Backend, StepInputs, StepOutputs
from dllava_export.backends.kv_plan import SPARE_ROWS, KVPlan, plan_kv_cache
from dllava_export.bundles.manifest import Manifest
from dllava_export.errors import CapacityError, InvalidInputError
from dllava_export.prompts.placeholders import check_prompt
from dllava_export.prompts.reader import PromptReader, Prompts
from dllava_export.prompts.rows import PromptRows, assemble_prompt
from dllava_export.runtime.results import DecodeResult, PrefillResult, RecomputeResult

if TYPE_CHECKING:
    from dllava_export.prompts.images import ImageProcessor
    from dllava_export.prompts.tokenizer import ChatTokenizer
    from dllava_export.runtime.results import Generation, ImageInput, OnToken


__all__ = ["Session"]


_ZERO, _ONE = np.zeros(1, np.int64), np.ones(1, np.int64)


class Session:
    """One conversation, or one batch of them, over a bundle. Made by `load`.

    Attributes:
        manifest: What the bundle is.
        max_length: Tokens a sample may have, prompt and answer together.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, backend: Backend, max_length: int
    ) -> None:
        self.manifest = manifest
        self.max_length = max_length
        self._backend = backend
        self._reader = PromptReader(folder, manifest, max_length, backend.encode_images)
        self._full = np.zeros(0, np.int64)
        self._sparse = np.zeros(0, np.int64)

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The bundle's tokenizer; `InvalidInputError` if it has none."""
        return self._reader.tokenizer

    @property
    def image_processor(self) -> ImageProcessor:
        """What turns pictures into `pixel_values`; `InvalidInputError` if there is no tower."""
        return self._reader.image_processor

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        if self.manifest.chat_template is not None:
            return self.tokenizer.eos_token_ids or self.manifest.eos_token_ids
        return self.manifest.eos_token_ids

    @property
    def kv_plan(self) -> KVPlan:
        """The cache buffers of the current batch.

        Raises:
            InvalidInputError: Before the first prefill.
        """
        if self._backend.plan is None:
            raise InvalidInputError("There is no cache yet; call prefill first.")
        return self._backend.plan

    @property
    def cache_lengths(self) -> np.ndarray:
        """Valid rows of each cache, [layers, batch] int64."""
        num_full = self.kv_plan.num_full_layers
        lengths = np.empty((self.manifest.geometry.num_layers, len(self._full)), np.int64)
        lengths[:num_full], lengths[num_full:] = self._full, self._sparse
        return lengths

    @property
    def is_full(self) -> np.ndarray:
        """[batch] bool, true where no further token fits."""
        return self._full >= self._room

    @property
    def _room(self) -> int:
        """Tokens a sample may have here; engines have more cache rows than were asked for."""
        return min(self.kv_plan.capacity_full - SPARE_ROWS, self.max_length)

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's keys and values, [batch, num_kv_heads, capacity, head_dim].

        Rows from `cache_lengths[layer]` on mean nothing. Keys are after rotary embedding.
        """
        assert self.kv_plan  # there is none before a prefill
        return self._backend.cache(layer)

    def prefill(
        self,
        input_ids: Prompts,
        pixel_values: np.ndarray | None = None,
        *,
        image_features: np.ndarray | None = None,
        max_new_tokens: int | None = None,
    ) -> PrefillResult:
        """Feed new prompts; whatever was cached before is dropped.

        Args:
            input_ids: [batch, t] int64, or one array per sample. -200 or the tokenizer's image
                token stands for the image.
            pixel_values: [num_images, 3, image_size, image_size] float32, one for each sample
                with a placeholder, in order.
            image_features: [num_images, num_image_tokens, hidden_size], instead of pixels.
            max_new_tokens: Tokens that will follow at most, answers and further prompts;
                as many as `max_length` allows by default. Sizes the caches.

        Raises:
            InvalidInputError: If prompts and images do not fit the bundle or each other.
            CapacityError: If a prompt is longer than `max_length`.
            ValueError: If `max_new_tokens` is negative.
        """
        if max_new_tokens is not None and max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}.")
        rows = self._reader.rows(input_ids, pixel_values, image_features)
        longest = int(rows.lengths.max())
        room = self.max_length - longest
        num_new = room if max_new_tokens is None else min(max_new_tokens, room)
        kept_lengths = self._reader.kept_lengths(rows)
        batch = len(rows.lengths)
        plan = plan_kv_cache(
            self.manifest.geometry,
            self.manifest.sparsity,
            batch=batch,
            num_prompt=longest,
            num_kept=int(kept_lengths.max()),
            num_new=num_new,
        )
        self._backend.allocate(plan)
        self._full, self._sparse = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        outputs = self._backend.run(self._step(rows, kept_lengths))
        self._advance(outputs)
        kept = _kept_image_indices(rows, outputs.kept_indices, kept_lengths)
        return PrefillResult(outputs.logits, kept, self.cache_lengths)

    def decode(
        self, token_ids: np.ndarray | Sequence[int], *, active: np.ndarray | None = None
    ) -> DecodeResult:
        """Feed one generated token per sample.

        Args:
            token_ids: [batch] int64.
            active: [batch] bool; samples that are finished are fed padding and do not change.
                All are active by default.

        Raises:
            CapacityError: If an active sample's cache is full.
            InvalidInputError: If there is no cache yet, `token_ids` or `active` is not one for
                each sample, or an id is not in the vocabulary.
        """
        # Every line here runs with the processor's caches emptied by the step before, where a
        # call into NumPy takes some 10 microseconds: hence few calls, and constants made once.
        plan = self.kv_plan
        ids = np.asarray(token_ids, np.int64)
        if ids.shape != (plan.batch,):
            raise InvalidInputError(
                f"decode got token ids of shape {ids.shape}, expected ({plan.batch},): one for "
                "each sample of the last prefill."
            )
        fed = _all_samples(plan.batch) if active is None else _some_samples(active, plan.batch)
        if max(self._full.tolist()) >= self._room:
            self._check_room(fed.is_active)
        before = self._sparse
        outputs = self._backend.decode(
            StepInputs(
                inputs_embeds=self._reader.lookup(ids)[:, None],
                position_ids=self._full[:, None],
                token_kind=fed.token_kind,
                num_kept=_ONE,
                kept_lengths=fed.num_rows,
                num_image_rows=_ZERO,
                write_index_full=self._full,
                write_index_sparse=before,
            )
        )
        self._advance(outputs)
        if self.manifest.sparsity.is_dense:
            keep, forced = fed.is_active.copy(), np.zeros(plan.batch, bool)
        else:
            keep = self._sparse > before
            wanted = fed.is_active if outputs.keep is None else outputs.keep & fed.is_active
            forced = wanted & ~keep
        return DecodeResult(outputs.logits, keep, forced, self.cache_lengths)

    def _check_room(self, is_active: np.ndarray) -> None:
        full = np.flatnonzero(is_active & self.is_full)
        if full.size:
            raise CapacityError(
                f"The KV cache of sample {full[0]} is full at {self._full[full[0]]} tokens. "
                "Allow more with max_length or max_new_tokens."
            )

    def extend(self, input_ids: Prompts) -> PrefillResult:
        """Feed a further prompt on top of the caches; all its rows are stored.

        Args:
            input_ids: [batch, t] int64, or one array per sample; text only.

        Returns:
            As prefill; `kept_image_indices` is empty.

        Raises:
            CapacityError: If it does not fit.
            InvalidInputError: If there is no cache yet, or an image in the prompt.
        """
        batch = self.kv_plan.batch
        prompts = self._reader.normalised(input_ids)
        if len(prompts) != batch:
            raise InvalidInputError(
                f"extend got {len(prompts)} prompts, expected {batch}: one for each sample of "
                "the last prefill."
            )
        check_prompt(prompts, has_image=False, vocab_size=self.manifest.geometry.vocab_size)
        rows = assemble_prompt(prompts, None, self._reader.lookup)
        self._make_room(rows.lengths)
        logits = [self._extend_sample(sample, rows) for sample in range(len(prompts))]
        return PrefillResult(
            np.concatenate(logits), np.zeros((len(prompts), 0), np.int64), self.cache_lengths
        )

    def recompute(
        self,
        input_ids: Prompts,
        pixel_values: np.ndarray | None = None,
        output_ids: np.ndarray | None = None,
        *,
        image_features: np.ndarray | None = None,
    ) -> RecomputeResult:
        """Run prompt and answer so far in one pass without a cache.

        Args:
            input_ids: As for prefill.
            pixel_values: As for prefill.
            output_ids: [batch, j] int64, the answer so far; none by default.
            image_features: As for prefill.

        Raises:
            InvalidInputError: If inputs do not fit the bundle or each other.
            CapacityError: If a prompt is longer than `max_length`.
        """
        outputs = None
        if output_ids is not None:
            outputs = np.asarray(output_ids, np.int64)
            if outputs.ndim != 2:
                raise InvalidInputError(
                    f"output_ids has shape {outputs.shape}, expected [batch, j]."
                )
        rows = self._reader.rows(input_ids, pixel_values, image_features, outputs)
        kept_lengths = self._reader.kept_lengths(rows)
        result = self._backend.recompute(self._step(rows, kept_lengths))
        num_rows = result.num_rows if result.num_rows is not None else kept_lengths
        return RecomputeResult(result.logits, num_rows)

    def generate(
        self,
        images: Sequence[ImageInput | None] | None = None,
        prompts: Sequence[str] | None = None,
        *,
        input_ids: Prompts | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        mode: str = "cache",
        on_token: OnToken | None = None,
    ) -> list[Generation]:
        """Answer a batch of prompts.

        Args:
            images: One per prompt: a path, a PIL image, an array, or None without an image.
            prompts: Questions; the bundle's chat template is put around them.
            input_ids: Token ids instead of `prompts`, as for prefill.
            max_new_tokens: Tokens generated at most, per sample.
            temperature: 0 takes the likeliest token.
            top_p: Share of probability to sample from, in (0, 1].
            seed: For sampling; each sample of a batch has its own stream.
            mode: `cache`, or `recompute` for a pass without KV cache per token.
            on_token: Called with (sample, token id, text) as tokens come; text is empty
                while it is incomplete, or without a tokenizer.

        Returns:
            One `Generation` per prompt, each equal to what the prompt gives alone.

        Raises:
            InvalidInputError: If prompts and images do not fit.
            CapacityError: If a prompt is too long.
            ValueError: If a setting is out of range.
        """
        from dllava_export.runtime.generation import generate

        return generate(
            self,
            images,
            prompts,
            input_ids=input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            mode=mode,
            on_token=on_token,
        )

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image features.

        Args:
            pixel_values: [num_images, 3, image_size, image_size] float32.

        Returns:
            [num_images, num_image_tokens, hidden_size], the bundle's precision.

        Raises:
            InvalidInputError: If the shape is wrong or the bundle takes no pictures.
        """
        return self._backend.encode_images(self._reader.checked_pixels(pixel_values))

    def normalised_prompts(self, input_ids: Prompts) -> list[np.ndarray]:
        """Return one int64 array per sample, with -200 as the only image placeholder."""
        return self._reader.normalised(input_ids)

    def _step(self, rows: PromptRows, kept_lengths: np.ndarray) -> StepInputs:
        return StepInputs(
            inputs_embeds=rows.inputs_embeds,
            position_ids=rows.position_ids,
            token_kind=rows.token_kind,
            num_kept=kept_lengths.max(keepdims=True),
            kept_lengths=kept_lengths,
            num_image_rows=rows.num_image.max(keepdims=True),
            write_index_full=self._full,
            write_index_sparse=self._sparse,
        )

    def _advance(self, outputs: StepOutputs) -> None:
        assert outputs.next_write_index_full is not None
        self._full = outputs.next_write_index_full
        sparse = outputs.next_write_index_sparse
        self._sparse = self._full if sparse is None else sparse

    def _make_room(self, lengths: np.ndarray) -> None:
        """Let the sparse caches grow for a further prompt; the full ones were planned for it."""
        plan = self.kv_plan
        needed = int((self._full + lengths).max())
        if needed > self._room:
            raise CapacityError(
                f"With this prompt the conversation has {needed} tokens, its KV cache has room "
                f"for {self._room}. Start anew, or prefill with a larger max_new_tokens or "
                "max_length."
            )
        sparse_rows = int((self._sparse + lengths).max())
        if plan.num_sparse_layers and sparse_rows + SPARE_ROWS > plan.capacity_sparse:
            left = self._room - needed
            grown = min(sparse_rows + left, sparse_rows + max(left // 2, 1))
            self._backend.grow_sparse(plan.with_sparse_rows(grown))

    def _extend_sample(self, sample: int, rows: PromptRows) -> np.ndarray:
        length = int(rows.lengths[sample])
        one = slice(sample, sample + 1)
        full, sparse = self._full[one], self._sparse[one]
        lengths = rows.lengths[one]
        inputs = StepInputs(
            inputs_embeds=rows.inputs_embeds[one, :length],
            position_ids=full[:, None] + np.arange(length),
            token_kind=rows.token_kind[one, :length],
            num_kept=lengths,
            kept_lengths=lengths,
            num_image_rows=np.zeros(1, np.int64),
            write_index_full=full,
            write_index_sparse=sparse,
        )
        outputs = self._backend.run(inputs, sample=sample)
        assert outputs.next_write_index_full is not None
        self._full, self._sparse = self._full.copy(), self._sparse.copy()
        self._full[one] = outputs.next_write_index_full
        next_sparse = outputs.next_write_index_sparse
        self._sparse[one] = self._full[one] if next_sparse is None else next_sparse
        return outputs.logits


@dataclasses.dataclass(frozen=True)
class _FedSamples:
    """Which samples a decode step feeds a token; the others get padding and do not change.

    Attributes:
        is_active: [batch] bool.
        num_rows: [batch] int64, rows fed: 1 or 0.
        token_kind: [batch, 1] int64.
    """

    is_active: np.ndarray
    num_rows: np.ndarray
    token_kind: np.ndarray


@functools.cache
def _all_samples(batch: int) -> _FedSamples:
    return _some_samples(np.ones(batch, bool), batch)


def _some_samples(active: np.ndarray, batch: int) -> _FedSamples:
    is_active = np.array(active, bool)
    if is_active.shape != (batch,):
        raise InvalidInputError(
            f"active has shape {is_active.shape}, expected ({batch},): one for each sample."
        )
    num_rows = is_active.astype(np.int64)
    return _FedSamples(is_active, num_rows, (num_rows * names.GENERATED_TEXT)[:, None])


def _kept_image_indices(
    rows: PromptRows, kept_indices: np.ndarray | None, kept_lengths: np.ndarray
) -> np.ndarray:
    """Return [batch, k] int64 within each image; -1 where a sample has none."""
    found = []
    for sample, num_image in enumerate(rows.num_image):
        start = rows.image_start[sample]
        kept = np.arange(num_image)
        if kept_indices is not None and num_image:
            indices = kept_indices[sample, : kept_lengths[sample]] - start
            kept = indices[(indices >= 0) & (indices < num_image)]
        found.append(kept)
    width = max((len(kept) for kept in found), default=0)
    result = np.full((len(found), width), -1, np.int64)
    for sample, kept in enumerate(found):
        result[sample, : len(kept)] = kept
    return result
