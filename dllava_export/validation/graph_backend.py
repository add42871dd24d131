"""Run a bundle's graphs in ONNX Runtime on the CPU and keep what they compute inside.

Unlike the product's backend this one can run the portable, un-lowered graphs, or dense ones
instead of the bundle's own; it is neither fast nor thrifty.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.backends.backend import Backend, StepInputs, StepOutputs
from dllava_export.backends.kv_plan import KVPlan
from dllava_export.backends.ort.backend import ONNXRUNTIME, open_session
from dllava_export.backends.ort.buffers import numpy_type
from dllava_export.bundles import layout
from dllava_export.validation.marked_graphs import MarkedModel, mark_decoder

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort


__all__ = ["GraphBackend", "bundle_graphs", "dense_graphs"]


class GraphBackend(Backend):
    """Decoder, recompute and visual graph of a bundle, run as they are.

    Args:
        folder: The bundle.
        graphs: Decoders by file name, over the bundle's weights; see `bundle_graphs`.
        layers: Keep the hidden states of every layer.
        lowered: Run the decoders in ONNX Runtime's own form.
        num_threads: Threads of ONNX Runtime; its own default where None.

    Attributes:
        decoder: The decoder with a KV cache and its further outputs.
        recompute_decoder: The one without.
        inner: Further outputs of the last run, by name.

    Raises:
        BackendError: If ONNX Runtime refuses a graph.
    """

    name = ONNXRUNTIME

    def __init__(
        self,
        folder: Path,
        graphs: dict[str, onnx.ModelProto],
        *,
        layers: bool,
        lowered: bool,
        num_threads: int | None = None,
    ) -> None:
        self.decoder = mark_decoder(graphs[layout.DECODER], layers=layers, lowered=lowered)
        self.recompute_decoder = mark_decoder(
            graphs[layout.RECOMPUTE], layers=layers, lowered=lowered
        )
        self._folder = folder
        self._num_threads = num_threads
        self._decoder = self._open(self.decoder)
        self._caches: dict[str, np.ndarray] = {}
        self.inner: dict[str, np.ndarray] = {}

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image features [num_images, num_image_tokens, hidden_size]."""
        path = self._folder / layout.VISUAL_FOLDER / layout.VISUAL
        session = open_session(path, num_threads=self._num_threads)
        dtype = numpy_type(session.get_inputs()[0].type)
        return session.run(None, {names.PIXEL_VALUES: pixel_values.astype(dtype)})[0]

    def allocate(self, plan: KVPlan) -> None:
        """Give the decoder empty caches of this plan."""
        self._caches = {}
        for entry in self._decoder.get_inputs():
            if names.is_past(entry.name):
                capacity = plan.capacities[names.group_of(entry.shape[2])]
                shape = (plan.batch, entry.shape[1], capacity, entry.shape[3])
                self._caches[entry.name] = np.zeros(shape, numpy_type(entry.type))
        self.plan = plan

    def grow(self, plan: KVPlan) -> None:
        """Move to larger buffers, keeping what is in them."""
        old = self._caches
        self.allocate(plan)
        for name, cache in self._caches.items():
            rows = min(cache.shape[2], old[name].shape[2])
            cache[:, :, :rows] = old[name][:, :, :rows]

    def run(self, inputs: StepInputs, *, sample: int | None = None) -> StepOutputs:
        """Feed rows on top of the caches, of all samples or of one."""
        part = slice(None) if sample is None else slice(sample, sample + 1)
        caches = {name: cache[part] for name, cache in self._caches.items()}
        values = self._run(self._decoder, self.decoder, {**inputs.tensors(), **caches})
        for name in caches:
            self._caches[name][part] = values[names.present_of(name)]
        return StepOutputs.from_tensors(values)

    def decode(self, inputs: StepInputs) -> StepOutputs:
        """Feed one row per sample."""
        return self.run(inputs)

    def recompute(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder without a cache over whole sequences."""
        marked = self.recompute_decoder
        return StepOutputs.from_tensors(
            self._run(self._open(marked), marked, inputs.tensors())
        )

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's key and value buffers, [batch, num_kv_heads, capacity, head_dim]."""
        return self._caches[names.past(layer, "key")], self._caches[names.past(layer, "value")]

    def set_cache(self, layer: int, key: np.ndarray, value: np.ndarray) -> None:
        """Write the first rows of a layer's buffers, [batch, num_kv_heads, rows, head_dim]."""
        for cache, rows in zip(self.cache(layer), (key, value), strict=True):
            cache[:, :, : rows.shape[2]] = rows

    def close(self) -> None:
        """Let sessions and caches go."""
        self._caches, self.inner = {}, {}
        del self._decoder

    def _open(self, marked: MarkedModel) -> ort.InferenceSession:
        llm = self._folder / layout.LLM_FOLDER
        return open_session(marked.model, folder=llm, num_threads=self._num_threads)

    def _run(
        self, session: ort.InferenceSession, marked: MarkedModel, values: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        feeds = {entry.name: values[entry.name] for entry in session.get_inputs()}
        wanted = [entry.name for entry in session.get_outputs()]
        found = dict(zip(wanted, session.run(None, feeds), strict=True))
        self.inner = {name: found[name] for name in marked.marked}
        if names.KEPT_INDICES in found:
            self.inner[names.KEPT_INDICES] = found[names.KEPT_INDICES]
        return found


def bundle_graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    """Return a bundle's decoders by file name; weights stay external."""
    import onnx

    llm = folder / layout.LLM_FOLDER
    return {
        name: onnx.load(llm / name, load_external_data=False)
        for name in (layout.DECODER, layout.RECOMPUTE)
    }


def dense_graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    """Return dense decoders, with and without a KV cache, over a bundle's weights."""
    import onnx

    from dllava_export.exporting.transform import transform_decoder
    from dllava_export.sparsity import Sparsity

    path = folder / layout.LLM_FOLDER / layout.DENSE_DECODER
    dense = onnx.load(path, load_external_data=False)
    models, _ = transform_decoder(dense, Sparsity(policy="none"), None)
    return models
