"""What a session asks of a backend: run graphs, own cache buffers; no bookkeeping."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from dllava_export.backends.kv_plan import KVPlan


__all__ = ["Backend", "StepInputs", "StepOutputs"]


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
        write_index_full: [batch] int64.
        write_index_sparse: [batch] int64.
    """

    inputs_embeds: np.ndarray
    position_ids: np.ndarray
    token_kind: np.ndarray
    num_kept: np.ndarray
    kept_lengths: np.ndarray
    num_image_rows: np.ndarray
    write_index_full: np.ndarray
    write_index_sparse: np.ndarray


@dataclasses.dataclass
class StepOutputs:
    """What one run of a decoder gives; None where the graph has no such output.

    Attributes:
        logits: [batch, vocab_size] float32.
        next_write_index_full: [batch] int64.
        next_write_index_sparse: [batch] int64 or None in a dense decoder.
        kept_indices: [batch, num_kept] int64 or None in a dense decoder.
        keep: [batch] bool or None without a keep bit: the policy's decision.
        num_rows: [batch] int64 or None: rows after all selections (recompute).
    """

    logits: np.ndarray
    next_write_index_full: np.ndarray | None = None
    next_write_index_sparse: np.ndarray | None = None
    kept_indices: np.ndarray | None = None
    keep: np.ndarray | None = None
    num_rows: np.ndarray | None = None


class Backend(Protocol):
    """A bundle opened in some runtime.

    Attributes:
        name: As `load` takes it.
        plan: The cache buffers that are allocated; None before the first prompt.
    """

    name: str
    plan: KVPlan | None

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image features [num_images, num_image_tokens, hidden_size]."""
        ...

    def allocate(self, plan: KVPlan) -> None:
        """Give the decoder cache buffers of this plan; what is in them does not matter."""
        ...

    def grow_sparse(self, plan: KVPlan) -> None:
        """Move the sparse group to larger buffers, keeping what is in them."""
        ...

    def run(self, inputs: StepInputs, *, sample: int | None = None) -> StepOutputs:
        """Feed rows on top of the caches, of all samples or of one."""
        ...

    def decode(self, inputs: StepInputs) -> StepOutputs:
        """Feed one row per sample; what can be prepared once is."""
        ...

    def recompute(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder without a cache over whole sequences."""
        ...

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's key and value buffers, [batch, num_kv_heads, capacity, head_dim]."""
        ...

    def set_cache(self, layer: int, key: np.ndarray, value: np.ndarray) -> None:
        """Write the first rows of a layer's buffers, [batch, num_kv_heads, rows, head_dim]."""
        ...
