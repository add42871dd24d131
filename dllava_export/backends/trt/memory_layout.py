"""Where tensors lie in the blocks that are copied to and from a GPU in one piece.

TensorRT wants every tensor at a multiple of 256 bytes; one copy of a whole block costs less
than one copy per tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dllava_export.precision import numpy_dtype

__all__ = ["ALIGNMENT", "BlockLayout", "TensorSpec", "resolved_tensors"]

ALIGNMENT = 256
"""Bytes; of every address that TensorRT is given."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor of known size.

    Attributes:
        dtype: NumPy's type, bfloat16 among them.
        shape: Sizes.
    """

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Tensors one after another, each aligned.

    Attributes:
        tensors: Name → what it is.
        offsets: Name → its first byte in the block.
        num_bytes: Size of the block, padding included; at least 1.
    """

    tensors: dict[str, TensorSpec]
    offsets: dict[str, int]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, TensorSpec]) -> BlockLayout:
        """Lay out tensors in the given order."""
        offsets, end = {}, 0
        for name, tensor in tensors.items():
            offsets[name] = end
            end += -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT
        return cls(dict(tensors), offsets, max(end, 1))

    def views(self, block: np.ndarray) -> dict[str, np.ndarray]:
        """Return each tensor as an array that shares the memory of `block`, [bytes] uint8."""
        return {
            name: block[start : start + self.tensors[name].num_bytes]
            .view(self.tensors[name].dtype)
            .reshape(self.tensors[name].shape)
            for name, start in self.offsets.items()
        }

    def addresses(self, base: int) -> dict[str, int]:
        """Return each tensor's address in a block that starts at `base`."""
        return {name: base + offset for name, offset in self.offsets.items()}


def resolved_tensors(
    entries: Sequence[Mapping[str, Any]], dims: Mapping[str, int]
) -> dict[str, TensorSpec]:
    """Return a graph's tensors with sizes in place of symbolic dimensions.

    Args:
        entries: Name, dtype and shape of each, as a manifest lists them.
        dims: Symbolic dimension → size.

    Raises:
        KeyError: If a symbolic dimension has no size.
    """
    return {
        entry["name"]: TensorSpec(
            numpy_dtype(entry["dtype"]),
            tuple(dims[size] if isinstance(size, str) else size for size in entry["shape"]),
        )
        for entry in entries
    }
