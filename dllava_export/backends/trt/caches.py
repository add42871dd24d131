"""KV caches and write indices in a GPU's memory, and what is bound of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dllava_export import names
from dllava_export.backends.trt.device_memory import CudaDevice, DeviceBuffer
from dllava_export.backends.trt.memory_layout import ALIGNMENT, BlockLayout, TensorSpec

__all__ = ["DeviceCaches", "WriteIndices"]

_INDICES = {names.write_index(g): names.next_write_index(g) for g in names.GROUPS}


class DeviceCaches:
    """One buffer per cache, for the engine's largest batch.

    Args:
        specs: Cache input name → [max_batch, num_kv_heads, capacity, head_dim].
        device: The GPU.

    Raises:
        BackendError: If there is not enough memory.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], device: CudaDevice) -> None:
        self._specs, self._device = dict(specs), device
        self._buffers = {
            name: device.allocate(spec.num_bytes, "the KV cache")
            for name, spec in specs.items()
        }
        self._sample_buffers: dict[str, DeviceBuffer] = {}

    @contextlib.contextmanager
    def addresses(self, sample: int | None = None) -> Iterator[dict[str, int]]:
        """Give the addresses of past and present caches, of all samples or of one.

        One sample's part of a buffer is used in place where it starts at an address that
        TensorRT takes; otherwise it is copied out and, behind the queued work, back.
        """
        if sample is None:
            yield _both({name: buffer.address for name, buffer in self._buffers.items()})
            return
        strides = {n: spec.num_bytes // spec.shape[0] for n, spec in self._specs.items()}
        starts = {n: self._buffers[n].address + sample * strides[n] for n in strides}
        if not any(stride % ALIGNMENT for stride in strides.values()):
            yield _both(starts)
            return
        if not self._sample_buffers:
            self._sample_buffers = {
                name: self._device.allocate(stride, "one sample's KV cache")
                for name, stride in strides.items()
            }
        copies = {name: buffer.address for name, buffer in self._sample_buffers.items()}
        for name, stride in strides.items():
            self._device.copy(copies[name], starts[name], stride)
        yield _both(copies)
        for name, stride in strides.items():
            self._device.copy(starts[name], copies[name], stride)

    def read(self, name: str, batch: int) -> np.ndarray:
        """Return a copy of a cache, [batch, num_kv_heads, capacity, head_dim]."""
        spec = self._specs[name]
        shape = (batch, *spec.shape[1:])
        return self._device.read(self._buffers[name].address, shape, spec.dtype)

    def write(self, name: str, rows: np.ndarray) -> None:
        """Write the first rows of a cache, [batch, num_kv_heads, rows, head_dim]; zeros follow."""
        spec = self._specs[name]
        values = np.zeros((len(rows), *spec.shape[1:]), spec.dtype)
        values[:, :, : rows.shape[2]] = rows
        self._device.copy(self._buffers[name].address, values.ctypes.data, values.nbytes)
        self._device.synchronize()


class WriteIndices:
    """The write index of each cache group, on the GPU from one decode step to the next.

    Args:
        inputs: The decoder's inputs: a dense decoder has one group.
        max_batch: Samples at most.
        device: The GPU.

    Attributes:
        names: Those of the decoder's inputs that are write indices.
    """

    def __init__(
        self, inputs: list[dict[str, Any]], max_batch: int, device: CudaDevice
    ) -> None:
        present = {entry["name"] for entry in inputs}
        self.names = tuple(name for name in _INDICES if name in present)
        self._device = device
        self._block = device.allocate(self._layout(max_batch).num_bytes, "write indices")
        self._known: dict[str, np.ndarray] = {}

    def _layout(self, batch: int) -> BlockLayout:
        spec = TensorSpec(np.dtype(np.int64), (batch,))
        return BlockLayout.of({name: spec for name in self.names})

    def addresses(self, batch: int) -> dict[str, int]:
        """Return where the engine reads them; what is there is not known any more."""
        self._known = {}
        return self._layout(batch).addresses(self._block.address)

    def outputs_first(self, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a decoder's outputs in the order in which `queue_update` wants them.

        The next write indices then lie in the output block as the write indices lie in theirs.
        """
        order = [_INDICES[name] for name in self.names]
        return sorted(
            outputs, key=lambda e: order.index(e["name"]) if e["name"] in order else len(order)
        )

    def upload(self, values: Mapping[str, np.ndarray]) -> None:
        """Copy values to the GPU unless the last step left the same ones there."""
        wanted = {name: values[name] for name in self.names}
        # A step that is interrupted moves them on without being remembered.
        known, self._known = self._known, {}
        if known and all(np.array_equal(known[name], value) for name, value in wanted.items()):
            return
        layout = self._layout(len(wanted[self.names[0]]))
        block = np.zeros(layout.num_bytes, np.uint8)
        for name, view in layout.views(block).items():
            view[...] = wanted[name]
        self._device.copy(self._block.address, block.ctypes.data, block.nbytes)
        self._device.synchronize()

    def queue_update(self, next_indices: int, batch: int) -> None:
        """Queue the copy of a step's next write indices, which lie at an address."""
        self._device.copy(self._block.address, next_indices, self._layout(batch).num_bytes)

    def remember(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Note what a step left on the GPU."""
        self._known = {name: outputs[_INDICES[name]] for name in self.names}


def _both(pasts: Mapping[str, int]) -> dict[str, int]:
    """Return addresses of past and present: each pair shares one buffer."""
    return {**pasts, **{names.present_of(name): address for name, address in pasts.items()}}
