"""Run a bundle: prefill, decode, further prompts, passes without a cache.

A `Session` keeps the bookkeeping that all backends share: which rows are fed, how long each
cache is, what was kept. A backend only runs graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from dllava_export import names
from dllava_export.backends.backend import Backend, StepInputs
from dllava_export.backends.kv_plan import KVPlan, joint_plan, plan_kv_cache
from dllava_export.boundary import raises_expected_errors_only
from dllava_export.bundles.manifest import Manifest
from dllava_export.errors import InvalidInputError, SettingError
from dllava_export.prompts.placeholders import check_prompt
from dllava_export.prompts.reader import AttentionMask, PromptReader, Prompts
from dllava_export.prompts.rows import PromptRows, assemble_prompt
from dllava_export.prompts.token_ids import CheckedPrompts, checked_ids
from dllava_export.runtime.results import DecodeResult, PrefillResult, RecomputeResult
from dllava_export.runtime.session_use import SessionUse
from dllava_export.runtime.slots import Slots
from dllava_export.settings import whole_number

if TYPE_CHECKING:
    from dllava_export.prompts.images import ImageProcessor
    from dllava_export.prompts.tokenizer import ChatTokenizer


__all__ = ["DecodingSession"]


_ROW_VALUE = 0.01


class DecodingSession:
    """One conversation, or one batch of them, over a bundle. Made by `load`.

    One caller at a time: while a generation runs, or another thread is inside of a call, calls
    are refused with `InvalidInputError`; so are all calls after `close`. Threads that want to
    work at the same time load a session each.

    Where the sparse caches of a sample are full, tokens that the policy keeps are dropped
    (`DecodeResult.forced`). How much room they have follows from the sample's own prompt and
    `max_new_tokens`, not from the rest of its batch.

    Attributes:
        manifest: What the bundle is.
        max_length: Tokens a sample may have, prompt and answer together.
        num_prefills: How often caches were filled anew.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, backend: Backend, max_length: int
    ) -> None:
        self.manifest = manifest
        self.max_length = max_length
        self._backend = backend
        self._reader = PromptReader(folder, manifest, max_length, backend.encode_images)
        self._slots = Slots(backend, max_length, manifest.max_position_embeddings)
        self._use = SessionUse()
        self.num_prefills = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let graphs, weights and caches go. The session cannot be used afterwards.

        A step that runs in another thread is waited for; the next one of its answer is refused.
        """
        with self._use.closing() as was_open:
            if was_open:
                self._backend.close()

    @property
    def use(self) -> SessionUse:
        """Who uses the session: a generation holds it from its first token to its end."""
        return self._use

    @property
    def backend(self) -> str:
        """Name of the backend that runs the bundle, as `load` takes it."""
        return self._backend.name

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
            InvalidInputError: Before the first prefill, or after `close`.
        """
        self._use.check_open()
        return self._slots.plan

    @property
    def cache_lengths(self) -> np.ndarray:
        """Valid rows of each cache, [layers, batch] int64."""
        self._use.check_open()
        return self._slots.cache_lengths

    @property
    def is_full(self) -> np.ndarray:
        """[batch] bool, true where no further token fits."""
        self._use.check_open()
        return self._slots.is_full

    @raises_expected_errors_only
    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's keys and values, [batch, num_kv_heads, capacity, head_dim].

        Rows from `cache_lengths[layer]` on mean nothing. Keys are after rotary embedding.

        Raises:
            SettingError: If there is no such layer.
        """
        num_layers = self.manifest.geometry.num_layers
        layer = whole_number("layer", layer, 0)
        if layer >= num_layers:
            raise SettingError(f"layer must be below {num_layers}, got {layer}.")
        with self._use:
            assert self.kv_plan  # there is none before a prefill
            return self._backend.cache(layer)

    @raises_expected_errors_only
    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the embeddings [..., hidden_size] of token ids [...] int64.

        Raises:
            InvalidInputError: If an id is outside the vocabulary, or there is no table.
        """
        return self._reader.lookup(checked_ids(token_ids, "token_ids"))

    def fill(self, num_tokens: int) -> None:
        """Leave the caches as so many generated tokens would, the expected share of them kept.

        For measurements: what the rows hold means nothing. In memory of the CPU they are
        written, since a row that never was costs less to read: the system backs all of those
        with one page.

        Args:
            num_tokens: Tokens that each sample seems to have generated.
        """
        num_tokens = whole_number("num_tokens", num_tokens, 0)
        sparsity = self.manifest.sparsity
        rate = sparsity.output_text_keep_rate if sparsity.has_keep_bit else 1.0
        with self._use:
            before = self.cache_lengths
            self._slots.advance(
                {names.FULL: num_tokens, names.SPARSE: round(rate * num_tokens)}
            )
            for layer, after in enumerate(self.cache_lengths):
                for rows in self._backend.cache(layer):
                    rows[:, :, before[layer].min() : after.max()] = _ROW_VALUE

    @raises_expected_errors_only
    def rewind(self, cache_lengths: np.ndarray) -> None:
        """Go back to what an earlier `cache_lengths` said: rows behind it are forgotten.

        Args:
            cache_lengths: [layers, batch] int64, as the property returned it.

        Raises:
            InvalidInputError: If they are no such lengths, or longer than they are now.
        """
        with self._use:
            self._use.check_filled_here()
            lengths = checked_ids(cache_lengths, "cache_lengths")
            now = self._slots.cache_lengths
            if lengths.shape != now.shape or ((lengths < 0) | (lengths > now)).any():
                raise InvalidInputError(
                    f"rewind got cache_lengths of shape {[*lengths.shape]} up to "
                    f"{lengths.max(initial=0)}, expected {[*now.shape]} of them, none beyond "
                    f"what they are now ({now.max()} at most). Pass what the property returned."
                )
            self._slots.rewind(lengths)

    @raises_expected_errors_only
    def prefill(
        self,
        input_ids: Prompts,
        pixel_values: np.ndarray | None = None,
        *,
        image_features: np.ndarray | None = None,
        attention_mask: AttentionMask | None = None,
        max_new_tokens: int | None = None,
    ) -> PrefillResult:
        """Feed new prompts; whatever was cached before is dropped.

        Args:
            input_ids: [batch, t] int64, one array per sample, or [t] of a single one. -200 or
                the tokenizer's image token stands for the image.
            pixel_values: [num_images, 3, image_size, image_size] float32, one for each sample
                with a placeholder, in order.
            image_features: [num_images, num_image_tokens, hidden_size], instead of pixels.
            attention_mask: [batch, t] of 0 and 1, needed where `input_ids` is padded, on
                whichever side: 0 where the padding is.
            max_new_tokens: Tokens that will follow at most, answers and further prompts;
                as many as `max_length` allows by default. Sizes the caches.

        Raises:
            InvalidInputError: If prompts and images do not fit the bundle or each other.
            CapacityError: If a prompt is longer than `max_length`.
            SettingError: If `max_new_tokens` is no whole number, or negative.
        """
        if max_new_tokens is not None:
            max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 0)
        with self._use:
            rows = self._reader.rows(
                input_ids, pixel_values, image_features, attention_mask=attention_mask
            )
            kept_lengths = self._reader.kept_lengths(rows)
            plans = self._plans(rows.lengths, kept_lengths, max_new_tokens)
            self._slots.allocate(joint_plan(plans), plans)
            self.num_prefills += 1
            self._use.note_filled()
            outputs = self._slots.admit(rows, kept_lengths)
            kept = _kept_image_indices(rows, outputs.kept_indices, kept_lengths)
            return PrefillResult(outputs.logits, kept, self.cache_lengths)

    def _plans(
        self, lengths: np.ndarray, kept_lengths: np.ndarray, max_new_tokens: int | None
    ) -> list[KVPlan]:
        """Return each sample's own plan: what it would have alone."""
        plans = []
        for length, num_kept in zip(lengths.tolist(), kept_lengths.tolist(), strict=True):
            room = self.max_length - length
            plan = plan_kv_cache(
                self.manifest.geometry,
                self.manifest.sparsity,
                self.manifest.precision,
                batch=1,
                num_prompt=length,
                num_kept=num_kept,
                num_new=room if max_new_tokens is None else min(max_new_tokens, room),
            )
            plans.append(plan)
        return plans

    @raises_expected_errors_only
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
        # Few lines, for the reason that `Slots.step` gives.
        with self._use:
            self._use.check_filled_here()
            batch = self._slots.plan.batch
            ids = checked_ids(token_ids, "token_ids")
            if ids.shape != (batch,):
                raise InvalidInputError(
                    f"decode got token ids of shape {ids.shape}, expected ({batch},): one for "
                    "each sample of the last prefill."
                )
            step = self._slots.step(self._reader.lookup(ids), active)
            return DecodeResult(step.logits, step.keep, step.forced, self._slots.cache_lengths)

    @raises_expected_errors_only
    def extend(
        self, input_ids: Prompts, *, attention_mask: AttentionMask | None = None
    ) -> PrefillResult:
        """Feed a further prompt on top of the caches; all its rows are stored.

        Args:
            input_ids: As for prefill; text only.
            attention_mask: As for prefill.

        Returns:
            As prefill; `kept_image_indices` is empty.

        Raises:
            CapacityError: If it does not fit.
            InvalidInputError: If there is no cache yet, or an image in the prompt.
        """
        with self._use:
            self._use.check_filled_here()
            return self._extend(input_ids, attention_mask)

    def _extend(
        self, input_ids: Prompts, attention_mask: AttentionMask | None
    ) -> PrefillResult:
        batch = self._slots.plan.batch
        prompts = self._reader.normalised(input_ids, attention_mask)
        if len(prompts) != batch:
            raise InvalidInputError(
                f"extend got {len(prompts)} prompts, expected {batch}: one for each sample of "
                "the last prefill."
            )
        check_prompt(prompts, has_image=False, vocab_size=self.manifest.geometry.vocab_size)
        reader = self._reader
        rows = [
            assemble_prompt([ids], None, reader.lookup, reader.positions) for ids in prompts
        ]
        self._slots.make_room(np.concatenate([one.lengths for one in rows]))
        logits = [self._slots.extend(one, slot).logits for slot, one in enumerate(rows)]
        return PrefillResult(
            np.concatenate(logits), np.zeros((len(prompts), 0), np.int64), self.cache_lengths
        )

    @raises_expected_errors_only
    def recompute(
        self,
        input_ids: Prompts,
        pixel_values: np.ndarray | None = None,
        output_ids: np.ndarray | None = None,
        *,
        image_features: np.ndarray | None = None,
        attention_mask: AttentionMask | None = None,
    ) -> RecomputeResult:
        """Run prompt and answer so far in one pass without a cache.

        Args:
            input_ids: As for prefill.
            pixel_values: As for prefill.
            output_ids: [batch, j] int64, the answer so far; none by default.
            image_features: As for prefill.
            attention_mask: As for prefill; of `input_ids`.

        Raises:
            InvalidInputError: If inputs do not fit the bundle or each other.
            CapacityError: If a prompt is longer than `max_length`.
        """
        with self._use:
            prompts = self._reader.normalised(input_ids, attention_mask)
            return self._recompute(prompts, pixel_values, output_ids, image_features)

    def _recompute(
        self,
        input_ids: Prompts,
        pixel_values: np.ndarray | None,
        output_ids: np.ndarray | None,
        image_features: np.ndarray | None,
    ) -> RecomputeResult:
        outputs = None
        if output_ids is not None:
            outputs = checked_ids(output_ids, "output_ids")
            if outputs.ndim != 2:
                raise InvalidInputError(
                    f"output_ids has shape {outputs.shape}, expected [batch, j]."
                )
        rows = self._reader.rows(input_ids, pixel_values, image_features, outputs)
        kept_lengths = self._reader.kept_lengths(rows)
        result = self._backend.recompute(
            StepInputs(
                inputs_embeds=rows.inputs_embeds,
                position_ids=rows.position_ids,
                token_kind=rows.token_kind,
                num_kept=kept_lengths.max(keepdims=True),
                kept_lengths=kept_lengths,
                num_image_rows=rows.num_image.max(keepdims=True),
                write_indices={},
            )
        )
        num_rows = result.num_rows if result.num_rows is not None else kept_lengths
        return RecomputeResult(result.logits, num_rows)

    @raises_expected_errors_only
    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image features.

        Args:
            pixel_values: [num_images, 3, image_size, image_size] float32.

        Returns:
            [num_images, num_image_tokens, hidden_size], the bundle's precision.

        Raises:
            InvalidInputError: If the shape is wrong or the bundle takes no pictures.
        """
        with self._use:
            return self._backend.encode_images(self._reader.checked_pixels(pixel_values))

    def normalised_prompts(
        self, input_ids: Prompts, attention_mask: AttentionMask | None = None
    ) -> CheckedPrompts:
        """Return one int64 array per sample, with -200 as the only image placeholder.

        Methods that take `input_ids` take the result as it is: nothing in it is padding.
        """
        return self._reader.normalised(input_ids, attention_mask)


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
