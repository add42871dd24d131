"""Run a bundle's TensorRT or TensorRT-RTX engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dllava_export import names
from dllava_export.backends.backend import Backend, StepInputs, StepOutputs
from dllava_export.backends.kv_plan import SPARE_ROWS, KVPlan
from dllava_export.backends.trt.decoder import TrtDecoder
from dllava_export.backends.trt.device_memory import CudaDevice
from dllava_export.backends.trt.engine import LoadedEngine, StagedEngine
from dllava_export.backends.trt.engine_config import (
    DECODER_ENGINE,
    RECOMPUTE_ENGINE,
    VISUAL_ENGINE,
)
from dllava_export.backends.trt.engine_files import (
    check_device,
    check_plan,
    checked_config,
    engine_bytes,
    engine_entry,
)
from dllava_export.backends.trt.trt_module import trt_logger, trt_module
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import Manifest
from dllava_export.precision import numpy_dtype

__all__ = ["TrtBackend"]

_GRAPHS = {
    DECODER_ENGINE: f"{layout.LLM_FOLDER}/{layout.DECODER}",
    RECOMPUTE_ENGINE: f"{layout.LLM_FOLDER}/{layout.RECOMPUTE}",
    VISUAL_ENGINE: f"{layout.VISUAL_FOLDER}/{layout.VISUAL}",
}


class TrtBackend(Backend):
    """A bundle in TensorRT or TensorRT-RTX: one engine for prefill and decode.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        name: `tensorrt` or `tensorrt-rtx`.
        verify: Compare the engine files with their digests.
        cuda_graph: Run decode steps as a CUDA graph.

    Attributes:
        name: As above.
        plan: The cache buffers in use; None before the first prompt.
        max_length: Tokens that a sample's cache holds, prompt and answer together.

    Raises:
        BackendError: If the library, the engines or a GPU are missing, or do not fit each
            other or the bundle.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        name: str,
        *,
        verify: bool = True,
        cuda_graph: bool = True,
    ) -> None:
        self.name = name
        self._folder, self._manifest, self._verify = folder, manifest, verify
        self._trt = trt_module(name)
        self._logger = trt_logger(self._trt)
        self._config = checked_config(folder, name, self._trt.__version__)
        self.max_length = self._config.capacities[names.FULL] - SPARE_ROWS
        decoder = engine_bytes(folder, self._config, DECODER_ENGINE, verify=verify)
        self._device = CudaDevice()
        check_device(self._config, self._device.name, self._device.compute_capability)
        self._decoder = TrtDecoder(
            self._loaded(DECODER_ENGINE, decoder),
            manifest.tensors[_GRAPHS[DECODER_ENGINE]],
            self._config,
            self._device,
            cuda_graph=cuda_graph,
        )
        self._engines: dict[str, StagedEngine] = {}

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image features [num_images, num_image_tokens, hidden_size]."""
        dtype = self._manifest.tensors[_GRAPHS[VISUAL_ENGINE]]["inputs"][0]["dtype"]
        pixels = pixel_values.astype(numpy_dtype(dtype))
        size = self._max_dims(VISUAL_ENGINE)[names.BATCH]
        engine = self._engine(VISUAL_ENGINE)
        parts = [
            engine.run({names.BATCH: len(part)}, {names.PIXEL_VALUES: part})
            for part in np.split(pixels, range(size, len(pixels), size))
        ]
        return np.concatenate([part[names.IMAGE_FEATURES] for part in parts])

    def allocate(self, plan: KVPlan) -> None:
        """Check that the engine's caches, which are there already, hold what is planned."""
        self.plan = check_plan(self._config, plan)

    def grow(self, plan: KVPlan) -> None:
        """Check that larger buffers fit: the engine's capacities are fixed."""
        self.allocate(plan)

    def run(self, inputs: StepInputs, *, sample: int | None = None) -> StepOutputs:
        """Feed rows on top of the caches, of all samples or of one."""
        return StepOutputs.from_tensors(self._decoder.run(inputs, sample))

    def decode(self, inputs: StepInputs) -> StepOutputs:
        """Feed one row per sample, as a CUDA graph where one was captured."""
        return StepOutputs.from_tensors(self._decoder.decode(inputs))

    def recompute(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder without a cache over whole sequences."""
        batch, rows = inputs.position_ids.shape
        dims = {
            names.BATCH: batch,
            names.ROWS: rows,
            names.NUM_KEPT_DIM: int(inputs.num_kept[0]),
        }
        return StepOutputs.from_tensors(
            self._engine(RECOMPUTE_ENGINE).run(dims, inputs.tensors())
        )

    def close(self) -> None:
        """Let engines, buffers and the CUDA stream go."""
        self._engines = {}
        del self._decoder, self._device

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of a layer's caches, [batch, num_kv_heads, capacity, head_dim]."""
        assert self.plan is not None  # the session has prefilled
        batch = self.plan.batch
        key, value = (names.past(layer, part) for part in ("key", "value"))
        return self._decoder.cache(key, batch), self._decoder.cache(value, batch)

    def set_cache(self, layer: int, key: np.ndarray, value: np.ndarray) -> None:
        """Write the first rows of a layer's buffers, [batch, num_kv_heads, rows, head_dim]."""
        self._decoder.set_cache(names.past(layer, "key"), key)
        self._decoder.set_cache(names.past(layer, "value"), value)

    def _engine(self, name: str) -> StagedEngine:
        """Load the visual or the recompute engine when it is first needed."""
        if name not in self._engines:
            blob = engine_bytes(self._folder, self._config, name, verify=self._verify)
            engine = self._loaded(name, blob)
            tensors = self._manifest.tensors[_GRAPHS[name]]
            self._engines[name] = StagedEngine(
                engine,
                next(iter(engine.entry.profiles)),
                self._device,
                inputs=tensors["inputs"],
                outputs=tensors["outputs"],
                max_dims=self._max_dims(name),
            )
        return self._engines[name]

    def _loaded(self, name: str, blob: np.ndarray) -> LoadedEngine:
        entry = engine_entry(self._config, name, self._folder)
        engine = LoadedEngine(self._trt, self._logger, blob, name, entry)
        if self._config.is_stripped:
            path = self._folder / _GRAPHS[name]
            engine.refit(self._lowered_graph(path), path)
        return engine

    def _lowered_graph(self, path: Path) -> bytes:
        """Return the graph that a stripped engine was built from, weights external."""
        from dllava_export.backends.trt.build.build_plan import load_structure
        from dllava_export.backends.trt.build.onnx_to_network import lowered_model
        from dllava_export.plugins import register_plugins

        config = self._config
        plugin_ops = tuple(op for op, how in config.plugins.items() if how == "plugin")
        if plugin_ops:  # the parser that reads the weights knows the nodes by their plugins
            register_plugins(self._trt)
        model = lowered_model(load_structure(path), config.capacities, plugin_ops)
        return model.SerializeToString()

    def _max_dims(self, name: str) -> dict[str, int]:
        """Return the largest size of each symbolic dimension in an engine's only profile."""
        entry = engine_entry(self._config, name, self._folder)
        (ranges,) = entry.profiles.values()
        dims: dict[str, int] = {}
        for tensor in self._manifest.tensors[_GRAPHS[name]]["inputs"]:
            covered = ranges.get(tensor["name"])
            if covered is not None and not covered.is_values:
                pairs = zip(tensor["shape"], covered.max, strict=True)
                dims |= {size: largest for size, largest in pairs if isinstance(size, str)}
        return {**dims, names.NUM_KEPT_DIM: dims.get(names.ROWS, 0)}
