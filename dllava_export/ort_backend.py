"""Run a bundle's graphs in ONNX Runtime, with KV buffers bound in place."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export import bundle, names
from dllava_export.backend import StepInputs, StepOutputs
from dllava_export.errors import BackendError
from dllava_export.kv_plan import KVPlan

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

__all__ = ["OrtBackend", "lowered_model", "open_session"]

logger = logging.getLogger(__name__)

_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
_HEAD_DIM_MULTIPLE = 8  # of GroupQueryAttention on the CPU


class OrtBackend:
    """A bundle in ONNX Runtime on the CPU: one session for prefill and decode.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        num_threads: Threads of ONNX Runtime; its own default where None.
        decoder: A portable decoder over the bundle's weights, instead of the bundle's own.

    Raises:
        BackendError: If ONNX Runtime is missing or cannot run the graphs.
    """

    name = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        manifest: bundle.Manifest,
        *,
        num_threads: int | None = None,
        decoder: onnx.ModelProto | None = None,
    ) -> None:
        if manifest.precision == "bf16":
            raise BackendError(
                "The bundle is in bf16, which ONNX Runtime has no CPU kernels for. Export with "
                "--precision fp16 or fp32."
            )
        head_dim = manifest.geometry.head_dim
        if head_dim % _HEAD_DIM_MULTIPLE:
            raise BackendError(
                f"The decoder has heads of {head_dim}, ONNX Runtime's attention takes multiples "
                f"of {_HEAD_DIM_MULTIPLE}. Use a checkpoint with another head_dim."
            )
        self._folder = folder
        self._manifest = manifest
        self._num_threads = num_threads
        self._decoder = self._open_decoder(decoder or bundle.DECODER)
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._caches: dict[str, np.ndarray] = {}
        self._decode: _BoundStep | None = None
        self.plan: KVPlan | None = None

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image features [num_images, num_image_tokens, hidden_size]."""
        session = self._session("visual")
        dtype = _numpy_type(session.get_inputs()[0].type)
        return session.run(None, {names.PIXEL_VALUES: pixel_values.astype(dtype)})[0]

    def allocate(self, plan: KVPlan) -> None:
        """Give the decoder cache buffers of this plan; those it has are used again if they fit.

        What is left in them from before is never read: attention stops at the write index.
        """
        if plan == self.plan:
            return
        self._decode = None
        self._caches = {
            entry.name: self._new_cache(entry, plan)
            for entry in self._decoder.get_inputs()
            if entry.name.startswith("past_key_values.")
        }
        self.plan = plan

    def grow_sparse(self, plan: KVPlan) -> None:
        """Move the sparse group to larger buffers: for a further prompt, not per step."""
        old = self._caches
        self.allocate(plan)
        for name, cache in self._caches.items():
            rows = min(cache.shape[2], old[name].shape[2])
            cache[:, :, :rows] = old[name][:, :, :rows]

    def run(self, inputs: StepInputs, *, sample: int | None = None) -> StepOutputs:
        """Feed rows on top of the caches, of all samples or of one.

        Several rows on top of a filled cache must go sample by sample: the attention kernel
        takes only one such sample at a time.
        """
        caches = self._caches
        if sample is not None:
            caches = {name: cache[sample : sample + 1] for name, cache in caches.items()}
        return _BoundStep(
            self._decoder, inputs, caches, self._manifest.geometry.vocab_size
        ).run()

    def decode(self, inputs: StepInputs) -> StepOutputs:
        """Feed one row per sample; bindings are made once and the input arrays re-used."""
        if self._decode is None:
            self._decode = _BoundStep(
                self._decoder, inputs, self._caches, self._manifest.geometry.vocab_size
            )
        else:
            self._decode.update(inputs)
        return self._decode.run()

    def recompute(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder without a cache over whole sequences."""
        session = self._session("recompute")
        feeds = {entry.name: getattr(inputs, entry.name) for entry in session.get_inputs()}
        wanted = [entry.name for entry in session.get_outputs()]
        values = dict(zip(wanted, session.run(None, feeds), strict=True))
        values[names.LOGITS] = values[names.LOGITS].astype(np.float32)
        return StepOutputs(**values)

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's key and value buffers, [batch, num_kv_heads, capacity, head_dim]."""
        return self._caches[names.past(layer, "key")], self._caches[names.past(layer, "value")]

    def _new_cache(self, entry: Any, plan: KVPlan) -> np.ndarray:
        is_sparse = entry.shape[2] == names.CAPACITY_SPARSE
        capacity = plan.capacity_sparse if is_sparse else plan.capacity_full
        shape = (plan.batch, entry.shape[1], capacity, entry.shape[3])
        return np.zeros(shape, _numpy_type(entry.type))

    def _session(self, what: str) -> ort.InferenceSession:
        """Open the visual or the recompute graph when it is first needed."""
        if what not in self._sessions:
            if what == "recompute":
                self._sessions[what] = self._open_decoder(bundle.RECOMPUTE)
            else:
                path = self._folder / bundle.VISUAL_FOLDER / bundle.VISUAL
                self._sessions[what] = open_session(path, num_threads=self._num_threads)
        return self._sessions[what]

    def _open_decoder(self, source: str | onnx.ModelProto) -> ort.InferenceSession:
        folder = self._folder / bundle.LLM_FOLDER
        model = lowered_model(folder / source if isinstance(source, str) else source)
        return open_session(model, folder=folder, num_threads=self._num_threads)


class _BoundStep:
    """One shape of decoder run: inputs, outputs and caches bound to fixed arrays."""

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: StepInputs,
        caches: dict[str, np.ndarray],
        vocab_size: int,
    ) -> None:
        import onnxruntime as ort

        self._session = session
        self._binding = session.io_binding()
        self._inputs = {}
        self._outputs = {}
        batch = len(inputs.position_ids)
        values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in caches.items()}
        for entry in session.get_inputs():
            if entry.name in values:
                self._binding.bind_ortvalue_input(entry.name, values[entry.name])
                continue
            array = np.ascontiguousarray(getattr(inputs, entry.name))
            self._inputs[entry.name] = array
            self._binding.bind_ortvalue_input(
                entry.name, ort.OrtValue.ortvalue_from_numpy(array)
            )
        shapes = {
            names.LOGITS: (batch, vocab_size),
            names.KEPT_INDICES: (batch, int(inputs.num_kept[0])),
        }
        for entry in session.get_outputs():
            past = entry.name.replace("present.", "past_key_values.")
            if past in values:
                self._binding.bind_ortvalue_output(entry.name, values[past])
                continue
            array = np.empty(shapes.get(entry.name, (batch,)), _numpy_type(entry.type))
            self._outputs[entry.name] = array
            self._binding.bind_ortvalue_output(
                entry.name, ort.OrtValue.ortvalue_from_numpy(array)
            )

    def update(self, inputs: StepInputs) -> None:
        """Copy new values into the bound arrays."""
        for name, array in self._inputs.items():
            array[...] = getattr(inputs, name)

    def run(self) -> StepOutputs:
        """Run and return copies of the outputs, logits in float32."""
        self._session.run_with_iobinding(self._binding)
        outputs = {name: array.copy() for name, array in self._outputs.items()}
        outputs[names.LOGITS] = outputs[names.LOGITS].astype(np.float32, copy=False)
        return StepOutputs(**outputs)


def lowered_model(source: Path | onnx.ModelProto) -> onnx.ModelProto:
    """Return a portable decoder in ONNX Runtime's form; weights stay external."""
    import onnx

    from dllava_export.passes import graph_from_model, model_from_graph, run_passes
    from dllava_export.pipeline import lowering_passes

    if isinstance(source, Path):
        source = onnx.load(source, load_external_data=False)
    graph = graph_from_model(source)
    run_passes(graph, lowering_passes())
    return model_from_graph(graph)


def open_session(
    model: Path | onnx.ModelProto,
    *,
    folder: Path | None = None,
    num_threads: int | None = None,
) -> ort.InferenceSession:
    """Open a model on the CPU.

    Args:
        model: A file, or a model whose external weights lie in `folder`.
        folder: See `model`.
        num_threads: Threads for one run; ONNX Runtime's default where None.

    Raises:
        BackendError: If ONNX Runtime is missing or refuses the model.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be imported ({error}). Install it: pip install onnxruntime-gpu"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Idle threads must not go on spinning: they would slow whatever runs between two steps.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    if folder is not None:
        options.add_session_config_entry(_FOLDER_KEY, str(folder))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        where = model if isinstance(model, Path) else folder
        raise BackendError(f"ONNX Runtime refuses the model in {where}: {error}") from error


def _numpy_type(onnx_type: str) -> np.dtype:
    """Return the dtype behind ONNX Runtime's `tensor(float16)` and the like."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))
