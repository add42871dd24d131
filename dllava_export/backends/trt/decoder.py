"""The decoder engine with its KV caches: prefill, further prompts, decode in a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from dllava_export import names
from dllava_export.backends.backend import StepInputs
from dllava_export.backends.trt.caches import DeviceCaches, WriteIndices
from dllava_export.backends.trt.device_memory import CudaDevice, CudaGraph
from dllava_export.backends.trt.engine import LoadedEngine, StagedEngine
from dllava_export.backends.trt.engine_config import DECODE, PREFILL, EngineConfig
from dllava_export.backends.trt.memory_layout import resolved_tensors
from dllava_export.errors import BackendError

__all__ = ["TrtDecoder"]

logger = logging.getLogger(__name__)


class TrtDecoder:
    """A decoder engine, its cache buffers and its write indices on the GPU.

    All buffers are allocated here, once, at the engine's capacities and largest batch.

    Args:
        engine: The decoder engine.
        tensors: The decoder's inputs and outputs, as the manifest lists them.
        config: What the engines were built for.
        device: The GPU.
        cuda_graph: Capture decode steps in a CUDA graph.

    Raises:
        BackendError: If the engine lacks a tensor, or there is not enough memory.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        tensors: Mapping[str, list[dict[str, Any]]],
        config: EngineConfig,
        device: CudaDevice,
        *,
        cuda_graph: bool,
    ) -> None:
        self._engine, self._config, self._device = engine, config, device
        self._wants_graph = cuda_graph and not engine.captures_by_itself
        self._inputs = tensors["inputs"]
        specs = {
            name: spec
            for name, spec in resolved_tensors(self._inputs, self._max_dims(PREFILL)).items()
            if names.is_past(name)
        }
        if config.plugins.get("KVCacheAttention") != "plugin":  # the plugin aliases by itself
            engine.check_aliases((names.present_of(name), name) for name in specs)
        self._caches = DeviceCaches(specs, device)
        self._indices = WriteIndices(self._inputs, config.max_batch_size, device)
        self._outputs = self._indices.outputs_first(tensors["outputs"])
        caches = frozenset(specs) | {names.present_of(name) for name in specs}
        self._prefill = self._staged(PREFILL, caches)
        self._decode = self._staged(
            DECODE, caches | frozenset(self._indices.names), cuda_graph=cuda_graph
        )
        self._bound_batch = 0
        self._is_warm = False
        self._graph: CudaGraph | None = None

    def run(self, inputs: StepInputs, sample: int | None) -> dict[str, np.ndarray]:
        """Feed rows on top of the caches, of all samples or of one.

        Raises:
            BackendError: If the prefill profile does not cover them, or the run fails.
        """
        batch, rows = inputs.position_ids.shape
        dims = self._dims(batch, rows, int(inputs.num_kept[0]))
        with self._caches.addresses(sample) as addresses:
            return self._prefill.run(dims, inputs.tensors(), addresses)

    def decode(self, inputs: StepInputs) -> dict[str, np.ndarray]:
        """Feed one row per sample; shapes are bound once per batch size.

        Raises:
            BackendError: If the decode profile does not cover the batch, or the run fails.
        """
        batch = len(inputs.position_ids)
        if batch != self._bound_batch:
            self._bind_decode(batch, inputs)
        self._indices.upload(inputs.tensors())
        self._decode.fill(inputs.tensors())
        self._launch()
        outputs = self._decode.read()
        self._indices.remember(outputs)
        return outputs

    def cache(self, name: str, batch: int) -> np.ndarray:
        """Return a copy of a cache, [batch, num_kv_heads, capacity, head_dim]."""
        return self._caches.read(name, batch)

    def set_cache(self, name: str, rows: np.ndarray) -> None:
        """Write the first rows of a cache, [batch, num_kv_heads, rows, head_dim]."""
        self._caches.write(name, rows)

    def _dims(self, batch: int, rows: int, num_kept: int) -> dict[str, int]:
        return {
            names.BATCH: batch,
            names.ROWS: rows,
            names.NUM_KEPT_DIM: num_kept,
            **{names.capacity(g): rows for g, rows in self._config.capacities.items()},
        }

    def _max_dims(self, profile: str) -> dict[str, int]:
        rows = self._config.max_input_len if profile == PREFILL else 1
        return self._dims(self._config.max_batch_size, rows, rows)

    def _staged(
        self, profile: str, elsewhere: frozenset[str], *, cuda_graph: bool = False
    ) -> StagedEngine:
        return StagedEngine(
            self._engine,
            profile,
            self._device,
            inputs=self._inputs,
            outputs=self._outputs,
            max_dims=self._max_dims(profile),
            elsewhere=elsewhere,
            cuda_graph=cuda_graph,
        )

    def _bind_decode(self, batch: int, inputs: StepInputs) -> None:
        self._bound_batch, self._graph, self._is_warm = 0, None, False
        with self._caches.addresses() as caches:
            addresses = {**caches, **self._indices.addresses(batch)}
            self._decode.bind(self._dims(batch, 1, 1), inputs.tensors(), addresses)
        self._bound_batch = batch

    def _launch(self) -> None:
        """Queue a decode step: captured from the second one on, since the first one warms up."""
        if self._graph is None and self._wants_graph and self._is_warm:
            try:
                self._graph = self._device.capture(self._queue_step)
            except BackendError as error:
                self._wants_graph = False
                logger.warning("Decode runs without a CUDA graph: %s", error)
        if self._graph is not None:
            self._graph.launch()
        else:
            self._queue_step()
        self._is_warm = True

    def _queue_step(self) -> None:
        self._decode.enqueue()
        source = self._decode.output_address(names.next_write_index(names.GROUPS[0]))
        self._indices.queue_update(source, self._bound_batch)
