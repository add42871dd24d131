"""Memory, copies, one stream and graphs of an NVIDIA GPU, through cuda-python."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from dllava_export.errors import BackendError

__all__ = ["CudaDevice", "CudaGraph", "DeviceBuffer", "PinnedBuffer"]

_INSTALL = 'pip install "dllava-export[trt-rtx]" (or "dllava-export[trt]")'
_MIB = 1 << 20


class DeviceBuffer:
    """Bytes on the GPU, freed with this object.

    Attributes:
        address: Of the first byte; aligned to 256 bytes at least.
        num_bytes: Size.
    """

    def __init__(self, runtime: Any, address: int, num_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes
        weakref.finalize(self, runtime.cudaFree, address)


class PinnedBuffer:
    """Page-locked bytes on the host, which the GPU copies without a detour.

    Attributes:
        array: [num_bytes] uint8. It must not be used after this object is gone.
    """

    def __init__(self, runtime: Any, address: int, num_bytes: int) -> None:
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
        weakref.finalize(self, runtime.cudaFreeHost, address)


class CudaGraph:
    """Work that was captured once and is launched as a whole."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device = device
        self._executable = executable
        weakref.finalize(self, device.runtime.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        """Queue the captured work.

        Raises:
            BackendError: If CUDA refuses.
        """
        self._device.call("cudaGraphLaunch", self._executable, self._device.stream)


class CudaDevice:
    """One GPU and one stream of its own on which everything is queued.

    Args:
        ordinal: Which GPU.

    Attributes:
        stream: The stream's handle.
        name: Product name, for example `NVIDIA L4`.
        compute_capability: For example `8.9`.
        runtime: `cuda.bindings.runtime`.

    Raises:
        BackendError: If cuda-python is missing, or there is no usable GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(
                f"cuda-python cannot be imported ({error}). Install it: {_INSTALL}"
            ) from error
        self.runtime = runtime
        self._check_driver(ordinal)
        self.call("cudaSetDevice", ordinal)
        properties = self.call("cudaGetDeviceProperties", ordinal)
        self.name = properties.name.split(b"\0")[0].decode()
        self.compute_capability = f"{properties.major}.{properties.minor}"
        handle = self.call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(handle)
        weakref.finalize(self, runtime.cudaStreamDestroy, handle)

    def _check_driver(self, ordinal: int) -> None:
        error, count = self.runtime.cudaGetDeviceCount()
        if int(error):
            reason = self.runtime.cudaGetErrorString(error)[1].decode()
            raise BackendError(
                f"No NVIDIA GPU can be used here: {error.name} ({reason}). TensorRT engines "
                "run on a GPU with a driver for CUDA 13; use --backend onnxruntime elsewhere, "
                "and `dllava-export doctor` to see what is there."
            )
        if ordinal >= count:
            raise BackendError(
                f"There is no GPU {ordinal}: CUDA sees {count}, numbered from 0. Choose one of "
                "them, or check CUDA_VISIBLE_DEVICES."
            )

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its one value, if it has any.

        Raises:
            BackendError: If it returns an error code.
        """
        error, *values = getattr(self.runtime, function)(*arguments)
        if int(error):
            self.runtime.cudaGetLastError()  # or TensorRT takes it for an error of its own
            reason = self.runtime.cudaGetErrorString(error)[1].decode()
            raise BackendError(f"CUDA's {function} failed: {error.name} ({reason}).")
        return values[0] if values else None

    def allocate(self, num_bytes: int, what: str) -> DeviceBuffer:
        """Return zeroed memory: attention multiplies unused cache rows by 0, and 0 * NaN is NaN.

        Args:
            num_bytes: Size, at least 1.
            what: What it is for, for the message.

        Raises:
            BackendError: If the GPU has not enough free memory.
        """
        error, address = self.runtime.cudaMalloc(num_bytes)
        if int(error):
            self.runtime.cudaGetLastError()
            _, free, total = self.runtime.cudaMemGetInfo()
            raise BackendError(
                f"The GPU could not allocate {num_bytes / _MIB:.1f} MiB for {what} "
                f"({error.name}): {free / _MIB:.0f} of {total / _MIB:.0f} MiB are free. Build "
                "engines with a smaller --max-batch-size or --max-kv-cache-capacity, or free "
                "memory."
            )
        buffer = DeviceBuffer(self.runtime, int(address), num_bytes)
        self.call("cudaMemsetAsync", buffer.address, 0, num_bytes, self.stream)
        return buffer

    def allocate_pinned(self, num_bytes: int) -> PinnedBuffer:
        """Return page-locked host memory of at least 1 byte.

        Raises:
            BackendError: If the host has not enough.
        """
        address = self.call("cudaMallocHost", num_bytes)
        return PinnedBuffer(self.runtime, int(address), num_bytes)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queue a copy between two addresses, each on the GPU or in pinned memory."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDefault
        self.call("cudaMemcpyAsync", target, source, num_bytes, kind, self.stream)

    def synchronize(self) -> None:
        """Wait until all queued work is done.

        Raises:
            BackendError: If some of it failed.
        """
        self.call("cudaStreamSynchronize", self.stream)

    def read(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Wait for queued work and return a copy of values on the GPU."""
        array = np.empty(shape, dtype)
        self.copy(array.ctypes.data, address, array.nbytes)
        self.synchronize()
        return array

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Record what `work` queues, without running it.

        Raises:
            BackendError: If the work cannot be captured.
        """
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            self.runtime.cudaStreamEndCapture(self.stream)  # or the stream stays unusable
            self.runtime.cudaGetLastError()
            raise
        graph = self.call("cudaStreamEndCapture", self.stream)
        executable = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return CudaGraph(self, executable)
