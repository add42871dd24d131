"""What a session asks of a backend: run graphs, own cache buffers; no bookkeeping."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dllava_export import names

if TYPE_CHECKING:
    import numpy as np

    from dllava_export.backends.kv_plan import KVPlan

__all__ = ["Backend", "StepInputs", "StepOutputs"]

# Made once: a decode step reads them.
_INPUTS = {group: names.write_index(group) for group in names.GROUPS}
_OUTPUTS = {group: names.next_write_index(group) for group in names.GROUPS}


@dataclasses.dataclass
class StepInputs:
    """What one run of a decoder reads beside its caches.

    Attributes:
        inputs_embeds: [batch, rows, hidden_size], the bundle's precision.
        position_ids: [batch, rows] int64.
        token_kind: [batch, rows] int64.
        num_kept: [1] int64.
        kept_lengths: [batch] int64.
        num_image_rows: [1] int64.
        write_indices: Cache group → [batch] int64, its next free row.
    """

    inputs_embeds: np.ndarray
    position_ids: np.ndarray
    token_kind: np.ndarray
    num_kept: np.ndarray
    kept_lengths: np.ndarray
    num_image_rows: np.ndarray
    write_indices: Mapping[str, np.ndarray]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the values by the names of the decoder's inputs."""
        found = dict(vars(self))
        for group, index in found.pop("write_indices").items():
            found[_INPUTS[group]] = index
        return found


@dataclasses.dataclass
class StepOutputs:
    """What one run of a decoder gives; None where the graph has no such output.

    Attributes:
        logits: [batch, vocab_size] float32.
        next_write_indices: Cache group → [batch] int64; empty where there is no cache.
        kept_indices: [batch, num_kept] int64 or None in a dense decoder.
        keep: [batch] bool or None without a keep bit: the policy's decision.
        num_rows: [batch] int64 or None: rows after all selections (recompute).
    """

    logits: np.ndarray
    next_write_indices: dict[str, np.ndarray]
    kept_indices: np.ndarray | None = None
    keep: np.ndarray | None = None
    num_rows: np.ndarray | None = None

    @classmethod
    def from_tensors(cls, values: Mapping[str, np.ndarray]) -> StepOutputs:
        """Return the outputs of a decoder by their names; caches and others are left out."""
        logits = values[names.LOGITS]
        return cls(
            logits=logits if logits.dtype == "float32" else logits.astype("float32"),
            next_write_indices={g: values[n] for g, n in _OUTPUTS.items() if n in values},
            kept_indices=values.get(names.KEPT_INDICES),
            keep=values.get(names.KEEP),
            num_rows=values.get(names.NUM_ROWS),
        )

    def tensors(self) -> dict[str, np.ndarray]:
        """Return what there is by the names of the decoder's outputs."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        for group, index in found.pop("next_write_indices").items():
            found[_OUTPUTS[group]] = index
        return found


class Backend(abc.ABC):
    """A bundle opened in some runtime. One caller at a time.

    Attributes:
        name: As `load` takes it.
        plan: The cache buffers that are allocated; None before the first prompt.
        max_length: Tokens that a sample's cache may hold, prompt and answer together; None
            where the backend sets no limit of its own.
    """

    name: str
    plan: KVPlan | None = None
    max_length: int | None = None

    @abc.abstractmethod
    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image features [num_images, num_image_tokens, hidden_size]."""

    @abc.abstractmethod
    def allocate(self, plan: KVPlan) -> None:
        """Give the decoder cache buffers of this plan; what is in them does not matter."""

    @abc.abstractmethod
    def grow(self, plan: KVPlan) -> None:
        """Move to the buffers of a plan with more rows, keeping what is in them."""

    @abc.abstractmethod
    def run(self, inputs: StepInputs, *, sample: int | None = None) -> StepOutputs:
        """Feed rows on top of the caches, of all samples or of one."""

    @abc.abstractmethod
    def decode(self, inputs: StepInputs) -> StepOutputs:
        """Feed one row per sample; what can be prepared once is."""

    @abc.abstractmethod
    def recompute(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder without a cache over whole sequences."""

    @abc.abstractmethod
    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's key and value buffers, [batch, num_kv_heads, capacity, head_dim]."""

    @abc.abstractmethod
    def set_cache(self, layer: int, key: np.ndarray, value: np.ndarray) -> None:
        """Write the first rows of a layer's buffers, [batch, num_kv_heads, rows, head_dim]."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let sessions, engines and buffers go; nothing is called afterwards."""
