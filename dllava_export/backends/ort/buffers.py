"""Arrays and cache buffers that ONNX Runtime reads and writes in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export import names
from dllava_export.errors import BackendError
from dllava_export.precision import numpy_dtype

if TYPE_CHECKING:
    import onnxruntime as ort


__all__ = ["BoundRun", "CacheBuffer", "numpy_type"]

_NUMPY_NAMES = {"float": "float32", "double": "float64"}  # where ONNX Runtime's differ


class CacheBuffer:
    """One KV cache buffer in the memory of a device, zeroed at first.

    Zeros matter: attention multiplies unused rows by 0, and 0 * NaN is NaN.

    Args:
        shape: [batch, num_kv_heads, capacity, head_dim].
        dtype: NumPy's type, bfloat16 among them.
        device: `cpu` or `cuda`.

    Attributes:
        shape: As above.
        dtype: As above.
        device: As above.
        address: Of the first value.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        # OrtValue knows no bfloat16 of NumPy; bytes are bytes.
        zeros = np.zeros(shape, f"uint{8 * dtype.itemsize}")
        self._value: Any = zeros
        if device == "cpu":
            self.address = zeros.ctypes.data
        else:
            self._move(zeros)

    def _move(self, array: np.ndarray) -> None:
        import onnxruntime as ort

        self._value = ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        self.address = self._value.data_ptr()

    def sample(self, index: int) -> tuple[int, tuple[int, ...]]:
        """Return address and shape of one sample's part."""
        stride = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self.address + index * stride, (1, *self.shape[1:])

    def numpy(self) -> np.ndarray:
        """Return the values: the buffer itself on the CPU, a copy of it from a GPU."""
        array = self._value if self.device == "cpu" else self._value.numpy()
        return array.view(self.dtype)

    def write_rows(self, source: np.ndarray) -> None:
        """Take over the rows of [batch, num_kv_heads, rows, head_dim], as many as fit."""
        rows = min(self.shape[2], source.shape[2])
        values = self.numpy().view(f"uint{8 * self.dtype.itemsize}")
        values[:, :, :rows] = source[:, :, :rows].view(values.dtype)
        if self.device != "cpu":
            self._move(values)


class BoundRun:
    """One shape of run: inputs, outputs and caches bound to fixed memory.

    Args:
        graph: Name of the graph, for messages.
        session: The graph, opened.
        inputs: Input name → array; what the graph does not take is left alone.
        output_shapes: Output name → shape; `[batch]` where it is not listed.
        caches: Cache input name → buffer; its `present` output is bound to the same memory.
        sample: Which sample's part of the caches is bound; all of them where None.
    """

    def __init__(
        self,
        graph: str,
        session: ort.InferenceSession,
        inputs: Mapping[str, np.ndarray],
        output_shapes: Mapping[str, tuple[int, ...]],
        caches: Mapping[str, CacheBuffer] | None = None,
        sample: int | None = None,
    ) -> None:
        self._graph, self._session = graph, session
        self._binding = session.io_binding()
        self._inputs: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}
        places = {
            name: (cache.address, cache.shape) if sample is None else cache.sample(sample)
            for name, cache in (caches or {}).items()
        }
        device = next((cache.device for cache in (caches or {}).values()), "cpu")
        presents = {names.present_of(name): name for name in places}
        # The binding knows addresses only: what they point to must live as long.
        self._caches = caches
        # A session on a GPU copies an input to there when it is bound, and never again.
        self._is_copied_when_bound = device != "cpu"
        for entry in session.get_inputs():
            if entry.name in places:
                self._bind(self._binding.bind_input, entry, device, *places[entry.name])
                continue
            # A copy: decode writes the next step's values into it.
            array = np.array(inputs[entry.name], order="C")
            self._inputs[entry.name] = array
            self._bind_from_host(entry, array)
        batch = len(next(iter(self._inputs.values())))
        for entry in session.get_outputs():
            if entry.name in presents:
                self._bind(
                    self._binding.bind_output, entry, device, *places[presents[entry.name]]
                )
                continue
            array = np.empty(output_shapes.get(entry.name, (batch,)), numpy_type(entry.type))
            self._outputs[entry.name] = array
            self._bind(self._binding.bind_output, entry, "cpu", array.ctypes.data, array.shape)

    def _bind(
        self, bind: Any, entry: Any, device: str, address: int, shape: tuple[int, ...]
    ) -> None:
        bind(entry.name, device, 0, _element_type(entry.type), shape, address)

    def _bind_from_host(self, entry: Any, array: np.ndarray) -> None:
        self._bind(self._binding.bind_input, entry, "cpu", array.ctypes.data, array.shape)

    def update(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copy new values into the bound arrays, and on to the GPU where there is one."""
        for name, array in self._inputs.items():
            array[...] = inputs[name]
        if self._is_copied_when_bound:
            for entry in self._session.get_inputs():
                if entry.name in self._inputs:
                    self._bind_from_host(entry, self._inputs[entry.name])

    def run(self) -> dict[str, np.ndarray]:
        """Run and return copies of the outputs; what was given to the constructor is kept.

        Raises:
            BackendError: If ONNX Runtime fails; the message names graph and shapes.
        """
        try:
            self._binding.synchronize_inputs()  # a GPU's copies are only queued
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:  # onnxruntime's errors share no base class
            shapes = ", ".join(
                f"{name} {'x'.join(map(str, array.shape))}"
                for name, array in self._inputs.items()
            )
            raise BackendError(
                f"ONNX Runtime failed in the {self._graph} graph: {str(error).strip()} Inputs: "
                f"{shapes}."
            ) from error
        return {name: array.copy() for name, array in self._outputs.items()}


def numpy_type(onnx_type: str) -> np.dtype:
    """Return the dtype behind ONNX Runtime's `tensor(float16)` and the like."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return numpy_dtype(_NUMPY_NAMES.get(name, name))


def _element_type(onnx_type: str) -> int:
    """Return ONNX's number of the element type in `tensor(float16)` and the like."""
    import onnx

    return onnx.helper.np_dtype_to_tensor_dtype(numpy_type(onnx_type))
