"""Plan the KV cache buffers of each group: memory is saved only where it is not allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from dllava_export import names
from dllava_export.backends.cache_groups import CacheGroup, cache_groups
from dllava_export.geometry import Geometry
from dllava_export.precision import Precision
from dllava_export.sparsity import Sparsity

__all__ = [
    "RESERVE_ROWS",
    "SPARE_ROWS",
    "KVPlan",
    "bytes_per_row",
    "joint_plan",
    "plan_kv_cache",
]

SPARE_ROWS = 1
"""Rows at the end of each buffer that are written but never counted."""

RESERVE_ROWS = 64
"""Rows the sparse group gets beyond its expected number: the predictor decides token by token."""


@dataclasses.dataclass(frozen=True)
class KVPlan:
    """Capacities in rows, the spare row included, and what they cost.

    Attributes:
        batch: Samples.
        groups: Cache groups of the decoder.
        capacities: Group name → rows per sample in each of its layers.
        bytes_per_row: Keys and values of one row in one layer.
    """

    batch: int
    groups: tuple[CacheGroup, ...]
    capacities: Mapping[str, int]
    bytes_per_row: int

    def num_bytes(self, group: CacheGroup) -> int:
        """Return the bytes allocated for the layers of a group."""
        rows = self.batch * group.num_layers * self.capacities[group.name]
        return rows * self.bytes_per_row

    @property
    def total_bytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(self.num_bytes(group) for group in self.groups)

    @property
    def layer_capacities(self) -> list[int]:
        """Rows per sample, layer by layer."""
        return [
            self.capacities[group.name]
            for group in self.groups
            for _ in range(group.num_layers)
        ]

    def with_rows(self, group: str, num_rows: int) -> KVPlan:
        """Return a plan in which a group holds `num_rows`, the spare row not counted."""
        return dataclasses.replace(
            self, capacities={**self.capacities, group: num_rows + SPARE_ROWS}
        )


def bytes_per_row(geometry: Geometry, precision: Precision) -> int:
    """Return the bytes of one row's keys and values in one layer."""
    return 2 * geometry.num_kv_heads * geometry.head_dim * precision.cache.num_bytes


def plan_kv_cache(
    geometry: Geometry,
    sparsity: Sparsity,
    precision: Precision,
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
        precision: How values are stored.
        batch: Samples.
        num_prompt: Prompt rows of the longest sample.
        num_kept: Prompt rows that go on from `sparse_layer`, of the sample with most.
        num_new: Tokens that may be generated or added later.

    Returns:
        The full group has num_prompt + num_new + spare rows; the sparse group num_kept +
        ceil(output_text_keep_rate * num_new) + reserve + spare, at most num_kept + num_new +
        spare.
    """
    rate = sparsity.output_text_keep_rate if sparsity.has_keep_bit else 1.0
    expected = min(math.ceil(rate * num_new) + RESERVE_ROWS, num_new)
    rows = {names.FULL: num_prompt + num_new, names.SPARSE: num_kept + expected}
    groups = cache_groups(geometry, sparsity)
    return KVPlan(
        batch=batch,
        groups=groups,
        capacities={group.name: rows[group.name] + SPARE_ROWS for group in groups},
        bytes_per_row=bytes_per_row(geometry, precision),
    )


def joint_plan(plans: Sequence[KVPlan]) -> KVPlan:
    """Return the plan of buffers that hold what several plans hold, side by side.

    Args:
        plans: Of the same decoder, at least one.
    """
    capacities = {
        name: max(plan.capacities[name] for plan in plans) for name in plans[0].capacities
    }
    return dataclasses.replace(
        plans[0], batch=sum(plan.batch for plan in plans), capacities=capacities
    )
