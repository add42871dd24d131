"""Plan the two groups of KV cache buffers: memory is saved only where it is not allocated."""

from __future__ import annotations

import dataclasses
import math

from dllava_export.geometry import Geometry
from dllava_export.sparsity import Sparsity

__all__ = ["RESERVE_ROWS", "SPARE_ROWS", "KVPlan", "plan_kv_cache"]

SPARE_ROWS = 1
"""Rows at the end of each buffer that are written but never counted."""

RESERVE_ROWS = 64
"""Rows the sparse group gets beyond its expected number: the predictor decides token by token."""


@dataclasses.dataclass(frozen=True)
class KVPlan:
    """Capacities in rows, the spare row included, and what they cost.

    Attributes:
        batch: Samples.
        num_full_layers: Layers below `sparse_layer`; all of them in a dense decoder.
        num_sparse_layers: Layers from `sparse_layer` on.
        capacity_full: Rows per sample in each of the full layers.
        capacity_sparse: Rows per sample in each of the sparse layers.
        bytes_per_row: Keys and values of one row in one layer.
    """

    batch: int
    num_full_layers: int
    num_sparse_layers: int
    capacity_full: int
    capacity_sparse: int
    bytes_per_row: int

    @property
    def bytes_full(self) -> int:
        """Bytes allocated for the layers below `sparse_layer`."""
        return self.batch * self.num_full_layers * self.capacity_full * self.bytes_per_row

    @property
    def bytes_sparse(self) -> int:
        """Bytes allocated for the layers from `sparse_layer` on."""
        return self.batch * self.num_sparse_layers * self.capacity_sparse * self.bytes_per_row

    def with_sparse_rows(self, num_rows: int) -> KVPlan:
        """Return a plan whose sparse group holds `num_rows`, the spare row not counted."""
        return dataclasses.replace(self, capacity_sparse=num_rows + SPARE_ROWS)


def plan_kv_cache(
    geometry: Geometry,
    sparsity: Sparsity,
    *,
    batch: int,
    num_prompt: int,
    num_kept: int,
    num_new: int,
) -> KVPlan:
    """Plan buffers for one batch.

    Args:
        geometry: Sizes of the decoder.
        sparsity: What is pruned.
        batch: Samples.
        num_prompt: Prompt rows of the longest sample.
        num_kept: Prompt rows that go on from `sparse_layer`, of the sample with most.
        num_new: Tokens that may be generated or added later.

    Returns:
        capacity_full = num_prompt + num_new + spare; capacity_sparse = num_kept +
        ceil(output_text_keep_rate * num_new) + reserve + spare, at most num_kept + num_new +
        spare.
    """
    rate = sparsity.output_text_keep_rate if sparsity.has_keep_bit else 1.0
    expected = min(math.ceil(rate * num_new) + RESERVE_ROWS, num_new)
    num_full = geometry.num_layers if sparsity.is_dense else sparsity.sparse_layer
    return KVPlan(
        batch=batch,
        num_full_layers=num_full,
        num_sparse_layers=geometry.num_layers - num_full,
        capacity_full=num_prompt + num_new + SPARE_ROWS,
        capacity_sparse=num_kept + expected + SPARE_ROWS,
        bytes_per_row=2 * geometry.num_kv_heads * geometry.head_dim * geometry.bytes_per_value,
    )
