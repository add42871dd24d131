"""Cache groups: which decoder layers store the same rows, and so share a capacity."""

from __future__ import annotations

import dataclasses

from dllava_export import names
from dllava_export.errors import SettingError
from dllava_export.geometry import Geometry
from dllava_export.sparsity import Sparsity

__all__ = ["CacheGroup", "cache_groups"]


@dataclasses.dataclass(frozen=True)
class CacheGroup:
    """Neighbouring decoder layers whose caches hold the same rows.

    Attributes:
        name: As `names.write_index` and `names.capacity` take it.
        first_layer: 0-based.
        num_layers: Layers in the group.
    """

    name: str
    first_layer: int
    num_layers: int

    @property
    def layers(self) -> slice:
        """The group's part of an array with one entry per layer."""
        return slice(self.first_layer, self.first_layer + self.num_layers)

    @property
    def text(self) -> str:
        """For people: `layers 2 to 31`."""
        return f"layers {self.first_layer} to {self.first_layer + self.num_layers - 1}"


def cache_groups(geometry: Geometry, sparsity: Sparsity) -> tuple[CacheGroup, ...]:
    """Return the groups of a decoder, lowest layers first; a dense one has a single group.

    Raises:
        SettingError: If `sparse_layer` is not a layer of the model.
    """
    num_layers = geometry.num_layers
    if sparsity.is_dense:
        return (CacheGroup(names.FULL, 0, num_layers),)
    first_sparse = sparsity.sparse_layer
    if first_sparse >= num_layers:
        raise SettingError(
            f"sparse_layer must be below the {num_layers} layers of the model, got "
            f"{first_sparse}."
        )
    return (
        CacheGroup(names.FULL, 0, first_sparse),
        CacheGroup(names.SPARSE, first_sparse, num_layers - first_sparse),
    )
