"""A TensorRT engine on a GPU: profiles, bindings, staged inputs and outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dllava_export import names
from dllava_export.backends.trt.device_memory import CudaDevice
from dllava_export.backends.trt.engine_config import EngineFile
from dllava_export.backends.trt.engine_files import check_request
from dllava_export.backends.trt.memory_layout import BlockLayout, TensorSpec, resolved_tensors
from dllava_export.errors import BackendError

__all__ = ["LoadedEngine", "StagedEngine"]

logger = logging.getLogger(__name__)

Entries = Sequence[Mapping[str, Any]]


class LoadedEngine:
    """A deserialized engine and what its file says of it.

    Args:
        trt: The TensorRT or TensorRT-RTX module.
        trt_logger: Its logger; remembers `errors`.
        blob: [num_bytes] uint8, the engine file.
        name: `decoder`, `visual` or `recompute`.
        entry: The engine's entry in the configuration.

    Attributes:
        name: As above.
        entry: As above.

    Raises:
        BackendError: If TensorRT refuses the engine.
    """

    def __init__(
        self, trt: Any, trt_logger: Any, blob: np.ndarray, name: str, entry: EngineFile
    ) -> None:
        self._trt, self._logger = trt, trt_logger
        self.name, self.entry = name, entry
        self._runtime = trt.Runtime(trt_logger)
        trt_logger.errors.clear()
        self._check_validity(blob)
        self._engine = self._runtime.deserialize_cuda_engine(blob)
        if self._engine is None:
            raise BackendError(
                f"{trt.__name__} {trt.__version__} refuses {entry.file}: {self._reasons()} "
                "Build the engines again on a machine with this version and GPU."
            )

    def refit(self, model: bytes, path: Path) -> None:
        """Give a stripped engine its weights.

        Args:
            model: The graph that it was built from, serialized, its weights external.
            path: Where the graph lies, so that its weights are found.

        Raises:
            BackendError: If a weight is missing or does not fit.
        """
        refitter = self._trt.Refitter(self._engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not (parser.refit_from_bytes(model, str(path)) and refitter.refit_cuda_engine()):
            raise BackendError(
                f"{self.entry.file} was built without weights and cannot take those of {path}: "
                f"{self._reasons()} Build the engines again, without --strip-weights."
            )

    def is_on_host(self, tensor: str) -> bool:
        """True for a shape tensor, whose values TensorRT reads on the host."""
        return self._engine.get_tensor_location(tensor) == self._trt.TensorLocation.HOST

    def check_aliases(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Warn where an output is not written in place, which costs a copy of the cache.

        TensorRT 10 need not have this question; without it nothing is said.

        Args:
            pairs: Output name and the input whose memory it shares.
        """
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return
        apart = [out for out, into in pairs if not self._is_aliased(out, into)]
        if apart:
            logger.warning(
                "The %s engine does not update %d caches in place (%s, ...), which is slower; "
                "it was built without TensorRT's own cache layer or plugin.",
                self.name,
                len(apart),
                apart[0],
            )

    def create_context(self, profile: str, device: CudaDevice, *, cuda_graph: bool) -> Any:
        """Return an execution context that is set to a profile.

        Activations are allocated for this profile alone. TensorRT-RTX captures CUDA graphs by
        itself where `cuda_graph` asks for them, since it swaps kernels while it runs; its
        documentation asks for static allocation then, of the largest profile's size.

        Raises:
            BackendError: If there is not enough memory, or no such profile.

        Source: TensorRT-RTX documentation, "Working with RTX CUDA Graphs", limitations.
        """
        trt, engine = self._trt, self._engine
        strategies = trt.ExecutionContextAllocationStrategy
        strategy = strategies.ON_PROFILE_CHANGE
        if self.captures_by_itself:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(
                strategies.STATIC if cuda_graph else strategy
            )
            graphs = trt.CudaGraphStrategy
            config.cuda_graph_strategy = (
                graphs.WHOLE_GRAPH_CAPTURE if cuda_graph else graphs.DISABLED
            )
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        index = list(self.entry.profiles).index(profile)
        if context is None or not context.set_optimization_profile_async(index, device.stream):
            raise BackendError(
                f"Profile {profile!r} of the {self.name} engine cannot be set up: "
                f"{self._reasons()} Free GPU memory, or build with smaller maxima."
            )
        device.synchronize()
        return context

    @property
    def captures_by_itself(self) -> bool:
        """True for TensorRT-RTX."""
        return hasattr(self._trt, "CudaGraphStrategy")

    def check_tensors(self, tensors: Mapping[str, TensorSpec]) -> None:
        """Check that the engine has these tensors, with these types.

        Raises:
            BackendError: If not.
        """
        found = {
            self._engine.get_tensor_name(i): self._engine.get_tensor_dtype(
                self._engine.get_tensor_name(i)
            ).name
            for i in range(self._engine.num_io_tensors)
        }
        wanted = {name: _TRT_TYPES[tensor.dtype.name] for name, tensor in tensors.items()}
        if found != wanted:
            differing = sorted(
                f"{name}: {found.get(name, 'absent')}, expected {wanted.get(name, 'absent')}"
                for name in found.keys() | wanted.keys()
                if found.get(name) != wanted.get(name)
            )
            raise BackendError(
                f"The {self.name} engine does not have the bundle's tensors ("
                f"{'; '.join(differing)}). Build the engines again."
            )

    def failure(self, what: str, shapes: Mapping[str, Sequence[int]]) -> BackendError:
        """Return an error for a call that TensorRT refused, with what it said."""
        listed = ", ".join(
            f"{name} {'x'.join(map(str, shape))}"
            for name, shape in shapes.items()
            if not names.is_past(name)
        )
        return BackendError(
            f"TensorRT could not {what} of the {self.name} engine: {self._reasons()} Inputs: "
            f"{listed}."
        )

    def _is_aliased(self, output: str, source: str) -> bool:
        return self._engine.get_aliased_input_tensor(output) == source

    def _check_validity(self, blob: np.ndarray) -> None:
        """Ask TensorRT-RTX whether the engine suits the GPU; TensorRT has no such question."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(blob)
        states = self._trt.EngineValidity
        if validity == states.INVALID:
            raise BackendError(
                f"TensorRT-RTX cannot run {self.entry.file} on this GPU (diagnostics "
                f"{diagnostics:#x}): {self._reasons()} Build the engines again with "
                "--compute-capability of this GPU."
            )
        if validity == states.SUBOPTIMAL:
            logger.warning(
                "%s runs on this GPU, but would be faster if it was built for it "
                "(--compute-capability).",
                self.entry.file,
            )

    def _reasons(self) -> str:
        messages = [str(message).rstrip(".") for message in self._logger.errors[-2:]]
        return ("; ".join(messages) or "it gave no reason") + "."


_TRT_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "bool": "BOOL",
}


class StagedEngine:
    """An engine under one profile; small inputs and outputs travel in one block each.

    Args:
        engine: The engine.
        profile: Its profile.
        device: The GPU.
        inputs: All inputs of the graph, as the manifest lists them.
        outputs: All outputs.
        max_dims: Largest size of each symbolic dimension.
        elsewhere: Inputs and outputs whose addresses the caller gives: caches, for example.
        cuda_graph: See `LoadedEngine.create_context`.

    Raises:
        BackendError: If there is not enough memory.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        profile: str,
        device: CudaDevice,
        *,
        inputs: Entries,
        outputs: Entries,
        max_dims: Mapping[str, int],
        elsewhere: frozenset[str] = frozenset(),
        cuda_graph: bool = False,
    ) -> None:
        self._engine, self._profile, self._device = engine, profile, device
        self._inputs, self._outputs = inputs, outputs
        engine.check_tensors(resolved_tensors([*inputs, *outputs], max_dims))
        self._context = engine.create_context(profile, device, cuda_graph=cuda_graph)
        self._on_host = {
            entry["name"]: np.zeros(entry["shape"], np.int64)
            for entry in inputs
            if engine.is_on_host(entry["name"])
        }
        self._elsewhere = elsewhere | self._on_host.keys()
        largest_in, largest_out = self._layouts(max_dims)
        what = f"inputs and outputs of the {engine.name} engine"
        self._input_block = device.allocate(largest_in.num_bytes, what)
        self._output_block = device.allocate(largest_out.num_bytes, what)
        self._pinned_input = device.allocate_pinned(largest_in.num_bytes)
        self._pinned_output = device.allocate_pinned(largest_out.num_bytes)
        self._input_layout, self._output_layout = largest_in, largest_out
        self._shapes: dict[str, tuple[int, ...]] = {}

    def _layouts(self, dims: Mapping[str, int]) -> tuple[BlockLayout, BlockLayout]:
        return tuple(  # type: ignore[return-value]
            BlockLayout.of(
                {
                    name: tensor
                    for name, tensor in resolved_tensors(entries, dims).items()
                    if name not in self._elsewhere
                }
            )
            for entries in (self._inputs, self._outputs)
        )

    def output_address(self, name: str) -> int:
        """Return where the engine writes an output, with the shapes that are bound."""
        return self._output_block.address + self._output_layout.offsets[name]

    def bind(
        self,
        dims: Mapping[str, int],
        values: Mapping[str, np.ndarray],
        addresses: Mapping[str, int],
    ) -> None:
        """Set shapes and addresses.

        Args:
            dims: Symbolic dimension → size.
            values: Input name → array; only those of shape tensors are read.
            addresses: Where the tensors named in `elsewhere` lie.

        Raises:
            BackendError: If the profile does not cover the shapes, or TensorRT refuses them.
        """
        self._shapes = {n: t.shape for n, t in resolved_tensors(self._inputs, dims).items()}
        ranges = self._engine.entry.profiles[self._profile]
        request: dict[str, Sequence[int] | np.ndarray] = {
            name: values[name] if name in ranges and ranges[name].is_values else shape
            for name, shape in self._shapes.items()
        }
        symbols = {entry["name"]: entry["shape"] for entry in self._inputs}
        check_request(self._engine.name, self._profile, ranges, request, symbols)
        self._input_layout, self._output_layout = self._layouts(dims)
        placed = {
            **addresses,
            **self._input_layout.addresses(self._input_block.address),
            **self._output_layout.addresses(self._output_block.address),
        }
        accepted = True
        for name, shape in self._shapes.items():
            if name in self._on_host:
                np.copyto(self._on_host[name], values[name])
                placed[name] = self._on_host[name].ctypes.data
            else:
                accepted &= self._context.set_input_shape(name, shape)
        for name, address in placed.items():
            accepted &= self._context.set_tensor_address(name, address)
        if not accepted:
            raise self._engine.failure(f"bind profile {self._profile!r}", self._shapes)

    def fill(self, values: Mapping[str, np.ndarray]) -> None:
        """Put values into the block that the next `enqueue` copies to the GPU."""
        for name, view in self._input_layout.views(self._pinned_input.array).items():
            np.copyto(view, values[name], casting="no")

    def enqueue(self) -> None:
        """Queue the copy of all inputs, the engine, and the copy of all outputs.

        Raises:
            BackendError: If TensorRT refuses.
        """
        device = self._device
        source = self._pinned_input.array.ctypes.data
        device.copy(self._input_block.address, source, self._input_layout.num_bytes)
        if not self._context.execute_async_v3(device.stream):
            raise self._engine.failure(f"run profile {self._profile!r}", self._shapes)
        target = self._pinned_output.array.ctypes.data
        device.copy(target, self._output_block.address, self._output_layout.num_bytes)

    def read(self) -> dict[str, np.ndarray]:
        """Wait, and return copies of the outputs.

        Raises:
            BackendError: If the run failed on the GPU.
        """
        self._device.synchronize()
        views = self._output_layout.views(self._pinned_output.array)
        return {name: view.copy() for name, view in views.items()}

    def run(
        self,
        dims: Mapping[str, int],
        values: Mapping[str, np.ndarray],
        addresses: Mapping[str, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Bind, fill, run and read."""
        self.bind(dims, values, addresses or {})
        self.fill(values)
        self.enqueue()
        return self.read()
