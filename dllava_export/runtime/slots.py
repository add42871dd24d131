"""Slots: sequences side by side in the caches, each filled, stepped and released on its own.

A slot is one sample's part of every cache buffer. What is known of it stands here: how many
rows of each cache group are valid, how many may be, and which position comes next. A backend
only runs graphs.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from dllava_export import names
from dllava_export.backends.backend import Backend, StepInputs, StepOutputs
from dllava_export.backends.kv_plan import SPARE_ROWS, KVPlan
from dllava_export.errors import CapacityError, InvalidInputError
from dllava_export.prompts.rows import PromptRows
from dllava_export.prompts.token_ids import checked_mask

__all__ = ["SlotStep", "Slots"]

_ZERO, _ONE = np.zeros(1, np.int64), np.ones(1, np.int64)


@dataclasses.dataclass(frozen=True)
class SlotStep:
    """What one token per slot gives.

    Attributes:
        logits: [slots, vocab_size] float32, for the token after it.
        keep: [slots] bool, true where its keys and values stay in every cache.
        forced: [slots] bool, true where the policy wanted to keep it but a cache was full.
    """

    logits: np.ndarray
    keep: np.ndarray
    forced: np.ndarray


class Slots:
    """The slots of a backend's caches.

    Args:
        backend: What runs the graphs.
        max_length: Tokens that a slot may have, prompt and answer together.
        most_positions: Tokens that the model takes: the largest `max_length` there is, and
            that where None.

    Attributes:
        write_indices: Cache group → [slots] int64, valid rows.
        limits: Cache group → [slots] int64, rows that may become valid: what a slot's own plan
            has, whatever its neighbours need.
        positions: [slots] int64, the position of each slot's next token: not a cache row.
        is_busy: [slots] bool, true from `admit` to `release`.
    """

    def __init__(
        self, backend: Backend, max_length: int, most_positions: int | None = None
    ) -> None:
        self._backend = backend
        self._max_length = max_length
        self._most_positions = most_positions or max_length
        self._plan: KVPlan | None = None
        self.write_indices: dict[str, np.ndarray] = {}
        self.limits: dict[str, np.ndarray] = {}
        self._room: list[int] = []
        self._binding_limits: dict[str, np.ndarray] = {}
        self.positions = np.zeros(0, np.int64)
        self.is_busy = np.zeros(0, bool)
        self._all_are_busy = False

    @property
    def plan(self) -> KVPlan:
        """The cache buffers in use.

        Raises:
            InvalidInputError: If none were allocated.
        """
        if self._plan is None:
            raise InvalidInputError("There is no cache yet; call prefill first.")
        return self._plan

    @property
    def is_full(self) -> np.ndarray:
        """[slots] bool, true where no further token fits."""
        return self.num_rows >= self.limits[self.plan.groups[0].name]

    @property
    def num_rows(self) -> np.ndarray:
        """[slots] int64, tokens of each slot so far: rows of the group that stores them all."""
        return self.write_indices[self.plan.groups[0].name]

    @property
    def cache_lengths(self) -> np.ndarray:
        """Valid rows of each cache, [layers, slots] int64."""
        plan = self.plan
        lengths = np.empty((plan.groups[-1].layers.stop, plan.batch), np.int64)
        for group in plan.groups:
            lengths[group.layers] = self.write_indices[group.name]
        return lengths

    def allocate(self, plan: KVPlan, own: Sequence[KVPlan] | None = None) -> None:
        """Make `plan.batch` idle slots; what was in the caches is dropped.

        Args:
            plan: The buffers.
            own: What each slot may use of them; all of it where None.
        """
        own = [plan] * plan.batch if own is None else own
        self._backend.allocate(plan)
        self._plan = self._backend.plan  # an engine's buffers may be larger
        self.write_indices = {
            group.name: np.zeros(plan.batch, np.int64) for group in plan.groups
        }
        self.positions = np.zeros(plan.batch, np.int64)
        self.is_busy = np.zeros(plan.batch, bool)
        self._all_are_busy = False
        # The first group stores every row: prompt and answer.
        first = plan.groups[0].name
        self._set_limits(
            {
                group.name: np.array(
                    [
                        min(one.capacities[group.name] - SPARE_ROWS, self._max_length)
                        if group.name == first
                        else one.capacities[group.name] - SPARE_ROWS
                        for one in own
                    ],
                    np.int64,
                )
                for group in plan.groups
            }
        )

    def _set_limits(self, limits: dict[str, np.ndarray]) -> None:
        """Note limits, and which of them the graph does not keep: it knows buffers only."""
        self.limits = limits
        first, *others = (group.name for group in self.plan.groups)
        self._room = limits[first].tolist()
        self._binding_limits = {
            name: limits[name]
            for name in others
            if limits[name].min() < self.plan.capacities[name] - SPARE_ROWS
        }

    def admit(
        self, rows: PromptRows, kept_lengths: np.ndarray, slot: int | None = None
    ) -> StepOutputs:
        """Feed prompts into slots that are empty from then on: one, or all of them at once.

        Args:
            rows: Prompts, as many as slots; a single one where `slot` is given.
            kept_lengths: [batch] int64, rows of each that go on from `sparse_layer`.
            slot: The slot to fill; its neighbours are not touched. All slots where None.

        Returns:
            What the decoder puts out for these prompts.

        Raises:
            InvalidInputError: If the number of prompts is another.
        """
        chosen = slice(None) if slot is None else slice(slot, slot + 1)
        count = len(self.positions[chosen])
        if len(rows.lengths) != count:
            raise InvalidInputError(
                f"{len(rows.lengths)} prompts were given for {count} slots; expected one for each."
            )
        self._empty(chosen)
        outputs = self._feed(rows, kept_lengths, rows.position_ids, slot)
        self.positions[chosen] = rows.next_positions
        self.is_busy[chosen] = True
        self._all_are_busy = bool(self.is_busy.all())
        return outputs

    def extend(self, rows: PromptRows, slot: int) -> StepOutputs:
        """Feed further text rows on top of what a slot holds; all of them are stored.

        Args:
            rows: One prompt without an image.
            slot: Where it goes.
        """
        length = int(rows.lengths[0])
        positions = self.positions[slot] + np.arange(length, dtype=np.int64)
        outputs = self._feed(rows, rows.lengths, positions[None], slot)
        self.positions[slot] += length
        return outputs

    def _empty(self, chosen: slice) -> None:
        # Never in place: a caller may hold the arrays of the step before.
        for name, index in self.write_indices.items():
            self.write_indices[name] = index.copy()
            self.write_indices[name][chosen] = 0

    def _feed(
        self,
        rows: PromptRows,
        kept_lengths: np.ndarray,
        position_ids: np.ndarray,
        slot: int | None,
    ) -> StepOutputs:
        chosen = slice(None) if slot is None else slice(slot, slot + 1)
        inputs = StepInputs(
            inputs_embeds=rows.inputs_embeds,
            position_ids=position_ids,
            token_kind=rows.token_kind,
            num_kept=kept_lengths.max(keepdims=True),
            kept_lengths=kept_lengths,
            num_image_rows=rows.num_image.max(keepdims=True),
            write_indices={name: index[chosen] for name, index in self.write_indices.items()},
        )
        outputs = self._backend.run(inputs, sample=slot)
        for name, index in outputs.next_write_indices.items():
            self.write_indices[name] = self.write_indices[name].copy()
            self.write_indices[name][chosen] = index
        return outputs

    def step(self, embeds: np.ndarray, active: np.ndarray | None = None) -> SlotStep:
        """Feed one generated token per slot.

        Args:
            embeds: [slots, hidden_size], the tokens' embeddings.
            active: [slots] bool; the others are fed padding and do not change. All slots that
                are busy where None.

        Raises:
            CapacityError: If an active slot is full.
            InvalidInputError: If `active` is not one for each slot.
        """
        # Every line here runs with the processor's caches emptied by the step before, where a
        # call into NumPy takes some 10 microseconds: hence few calls, and constants made once.
        plan = self.plan
        if active is None:
            fed = _all_slots(plan.batch) if self._all_are_busy else _fed_slots(self.is_busy)
        else:
            fed = _some_slots(active, plan.batch)
        first, last = plan.groups[0].name, plan.groups[-1].name
        if any(map(operator.ge, self.write_indices[first].tolist(), self._room)):
            self._check_room(fed.is_active)
        before = self.write_indices[last]
        outputs = self._backend.decode(
            StepInputs(
                inputs_embeds=embeds[:, None],
                position_ids=self.positions[:, None],
                token_kind=fed.token_kind,
                num_kept=_ONE,
                kept_lengths=fed.num_rows,
                num_image_rows=_ZERO,
                write_indices=self.write_indices,
            )
        )
        self.write_indices = outputs.next_write_indices
        for name, limit in self._binding_limits.items():
            # As the graph does it for the buffer: a row behind the limit is not counted.
            self.write_indices[name] = np.minimum(self.write_indices[name], limit)
        self.positions = self.positions + fed.num_rows
        keep = self.write_indices[last] > before
        wanted = fed.is_active if outputs.keep is None else outputs.keep & fed.is_active
        return SlotStep(outputs.logits, keep, wanted > keep)  # forced: wanted and not kept

    def release(self, slot: int) -> None:
        """Let a slot go: it is idle until something is admitted to it."""
        self._empty(slice(slot, slot + 1))
        self.is_busy[slot] = False
        self._all_are_busy = False

    def make_room(self, lengths: np.ndarray) -> None:
        """Let caches grow where `lengths` [slots] further rows do not fit.

        Groups that store every row were planned for all that may come; only the others grow.

        Raises:
            CapacityError: If a slot has no room for its rows.
        """
        plan = self.plan
        room = self.limits[plan.groups[0].name]
        needed = self.num_rows + lengths
        for slot in np.flatnonzero(needed > room):
            remedy = self._remedy(int(room[slot]), ", or allow more with ")
            raise CapacityError(
                f"With this prompt the conversation has {needed[slot]} tokens, its KV cache has "
                f"room for {room[slot]}. Start anew{remedy}."
            )
        left = room - needed
        limits = dict(self.limits)
        for group in plan.groups[1:]:
            rows = self.write_indices[group.name] + lengths
            grown = rows + np.minimum(left, np.maximum(left // 2, 1))
            if self._backend.max_length is not None:  # buffers that cannot grow
                most = plan.capacities[group.name] - SPARE_ROWS
                grown = np.minimum(grown, np.maximum(rows, most))
            limit = limits[group.name]
            limits[group.name] = limit = np.where(rows > limit, grown, limit)
            if limit.max() + SPARE_ROWS > plan.capacities[group.name]:
                self._backend.grow(plan.with_rows(group.name, int(limit.max())))
                self._plan = plan = self._backend.plan or plan
        self._set_limits(limits)

    def advance(self, num_rows: Mapping[str, int]) -> None:
        """Count rows as stored that were not fed: to time what a length costs.

        Args:
            num_rows: Cache group → rows added to each slot.
        """
        self.write_indices = {
            name: index + num_rows[name] for name, index in self.write_indices.items()
        }
        self.positions = self.positions + num_rows[self.plan.groups[0].name]

    def rewind(self, cache_lengths: np.ndarray) -> None:
        """Forget the rows behind what `cache_lengths` [layers, slots] once said."""
        before = self.num_rows
        self.write_indices = {
            group.name: cache_lengths[group.first_layer].copy() for group in self.plan.groups
        }
        self.positions = self.positions - (before - self.num_rows)

    def _check_room(self, is_active: np.ndarray) -> None:
        full = np.flatnonzero(is_active & self.is_full)
        for slot in full:
            length = int(self.num_rows[slot])
            raise CapacityError(
                f"The KV cache of sample {slot} is full at {length} tokens. "
                f"{self._remedy(length, 'Allow more with ') or 'The model takes no more'}."
            )

    def _remedy(self, room: int, verb: str) -> str:
        """Return what gives a sample more than `room` tokens; empty where nothing does."""
        if room < self._max_length:
            return f"{verb}a larger max_new_tokens"
        if self._max_length < self._most_positions:
            return f"{verb}a larger max_length ({self._most_positions} at most)"
        return ""


@dataclasses.dataclass(frozen=True)
class _FedSlots:
    """Which slots a step feeds a token; the others get padding and do not change.

    Attributes:
        is_active: [slots] bool.
        num_rows: [slots] int64, rows fed: 1 or 0.
        token_kind: [slots, 1] int64.
    """

    is_active: np.ndarray
    num_rows: np.ndarray
    token_kind: np.ndarray


@functools.cache
def _all_slots(num_slots: int) -> _FedSlots:
    return _fed_slots(np.ones(num_slots, bool))


def _some_slots(active: np.ndarray, num_slots: int) -> _FedSlots:
    # Copied: a caller may write into its own before the next step.
    return _fed_slots(checked_mask(active, "active", (num_slots,)).copy())


def _fed_slots(is_active: np.ndarray) -> _FedSlots:
    num_rows = is_active.astype(np.int64)
    return _FedSlots(is_active, num_rows, (num_rows * names.GENERATED_TEXT)[:, None])
