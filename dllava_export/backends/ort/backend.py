"""Run a bundle's graphs in ONNX Runtime, with KV buffers bound in place on CPU or GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export import names
from dllava_export.backends.backend import Backend, StepInputs, StepOutputs
from dllava_export.backends.kv_plan import KVPlan
from dllava_export.backends.ort.buffers import BoundRun, CacheBuffer, numpy_type
from dllava_export.backends.ort.providers import (
    check_provider,
    execution_providers,
    log_nodes_on_cpu,
)
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import Manifest
from dllava_export.errors import BackendError
from dllava_export.precision import BF16

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort


__all__ = ["ONNXRUNTIME", "OrtBackend", "lowered_model", "open_session"]

logger = logging.getLogger(__name__)

ONNXRUNTIME = "onnxruntime"

_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
_ASSIGNMENT_KEY = "session.record_ep_graph_assignment_info"
_HEAD_DIM_MULTIPLE = 8  # of GroupQueryAttention


class OrtBackend(Backend):
    """A bundle in ONNX Runtime: one session for prefill and decode.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        provider: `cpu`, or `cuda` for an NVIDIA GPU.
        num_threads: Threads of ONNX Runtime; its own default where None.
        decoder: A portable decoder over the bundle's weights, instead of the bundle's own.
        wrap_session: Called with each inference session that is opened; what it returns is
            run in its place, for example to time the runs.

    Attributes:
        name: As `load` takes it.
        plan: The cache buffers in use; None before the first prompt.
        max_length: None: caches are as large as they are planned.

    Raises:
        BackendError: If ONNX Runtime is missing, lacks the provider, or cannot run the graphs.
    """

    name = ONNXRUNTIME

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        provider: str = "cpu",
        num_threads: int | None = None,
        decoder: onnx.ModelProto | None = None,
        wrap_session: Callable[[Any], Any] = lambda session: session,
    ) -> None:
        if BF16 in (manifest.precision.activations, manifest.precision.cache) and (
            provider == "cpu"
        ):
            raise BackendError(
                "The bundle is in bf16, which ONNX Runtime has no CPU kernels for. Export with "
                "--precision fp16 or fp32, or run it with --provider cuda."
            )
        head_dim = manifest.geometry.head_dim
        if head_dim % _HEAD_DIM_MULTIPLE:
            raise BackendError(
                f"The decoder has heads of {head_dim}, ONNX Runtime's attention takes multiples "
                f"of {_HEAD_DIM_MULTIPLE}. Use a checkpoint with another head_dim."
            )
        self._folder = folder
        self._manifest = manifest
        self._provider = provider
        self._num_threads = num_threads
        self._wrap_session = wrap_session
        self._decoder = self._open_decoder(decoder or layout.DECODER)
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._caches: dict[str, CacheBuffer] = {}
        self._decode: BoundRun | None = None

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image features [num_images, num_image_tokens, hidden_size]."""
        session = self._session("visual")
        geometry = self._manifest.geometry
        shape = (len(pixel_values), geometry.num_image_tokens, geometry.hidden_size)
        pixels = pixel_values.astype(numpy_type(session.get_inputs()[0].type))
        run = BoundRun(
            "visual", session, {names.PIXEL_VALUES: pixels}, {names.IMAGE_FEATURES: shape}
        )
        return run.run()[names.IMAGE_FEATURES]

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
            if names.is_past(entry.name)
        }
        self.plan = plan

    def grow(self, plan: KVPlan) -> None:
        """Move to larger buffers, keeping what is in them: for a further prompt, not per step."""
        old = self._caches
        self.allocate(plan)
        for name, cache in self._caches.items():
            cache.write_rows(old[name].numpy())

    def run(self, inputs: StepInputs, *, sample: int | None = None) -> StepOutputs:
        """Feed rows on top of the caches, of all samples or of one.

        Several rows on top of a filled cache must go sample by sample: the attention kernel
        takes only one such sample at a time.
        """
        return StepOutputs.from_tensors(self._bound_decoder(inputs, sample).run())

    def decode(self, inputs: StepInputs) -> StepOutputs:
        """Feed one row per sample; bindings are made once and the input arrays re-used."""
        if self._decode is None:
            self._decode = self._bound_decoder(inputs, None)
        else:
            self._decode.update(inputs.tensors())
        return StepOutputs.from_tensors(self._decode.run())

    def recompute(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder without a cache over whole sequences."""
        session = self._session("recompute")
        run = BoundRun("recompute", session, inputs.tensors(), self._output_shapes(inputs))
        return StepOutputs.from_tensors(run.run())

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's key and value buffers, [batch, num_kv_heads, capacity, head_dim].

        On the CPU they are the buffers themselves, from a GPU they are copies.
        """
        key, value = (self._caches[names.past(layer, part)] for part in ("key", "value"))
        return key.numpy(), value.numpy()

    def set_cache(self, layer: int, key: np.ndarray, value: np.ndarray) -> None:
        """Write the first rows of a layer's buffers, [batch, num_kv_heads, rows, head_dim]."""
        for part, rows in (("key", key), ("value", value)):
            self._caches[names.past(layer, part)].write_rows(rows)

    def _bound_decoder(self, inputs: StepInputs, sample: int | None) -> BoundRun:
        shapes = self._output_shapes(inputs)
        values = inputs.tensors()
        return BoundRun("decoder", self._decoder, values, shapes, self._caches, sample)

    def close(self) -> None:
        """Let sessions and buffers go."""
        self._decode, self.plan = None, None
        self._sessions, self._caches = {}, {}
        del self._decoder

    def _output_shapes(self, inputs: StepInputs) -> dict[str, tuple[int, ...]]:
        batch = len(inputs.position_ids)
        return {
            names.LOGITS: (batch, self._manifest.geometry.vocab_size),
            names.KEPT_INDICES: (batch, int(inputs.num_kept[0])),
        }

    def _new_cache(self, entry: Any, plan: KVPlan) -> CacheBuffer:
        capacity = plan.capacities[names.group_of(entry.shape[2])]
        shape = (plan.batch, entry.shape[1], capacity, entry.shape[3])
        return CacheBuffer(shape, numpy_type(entry.type), self._provider)

    def _session(self, what: str) -> ort.InferenceSession:
        """Open the visual or the recompute graph when it is first needed."""
        if what not in self._sessions:
            if what == "recompute":
                self._sessions[what] = self._open_decoder(layout.RECOMPUTE)
            else:
                path = self._folder / layout.VISUAL_FOLDER / layout.VISUAL
                self._sessions[what] = self._open(path)
        return self._sessions[what]

    def _open_decoder(self, source: str | onnx.ModelProto) -> ort.InferenceSession:
        folder = self._folder / layout.LLM_FOLDER
        model = lowered_model(
            folder / source if isinstance(source, str) else source,
            provider=self._provider,
        )
        return self._open(model, folder)

    def _open(
        self, model: Path | onnx.ModelProto, folder: Path | None = None
    ) -> ort.InferenceSession:
        session = open_session(
            model, folder=folder, provider=self._provider, num_threads=self._num_threads
        )
        return self._wrap_session(session)


def lowered_model(source: Path | onnx.ModelProto, *, provider: str = "cpu") -> onnx.ModelProto:
    """Return a portable decoder in ONNX Runtime's form; weights stay external.

    Args:
        source: The decoder, or its file.
        provider: `cpu` or `cuda`: their kernels take different types.
    """
    import onnx

    from dllava_export.pipeline import lowering_passes, transformed

    if isinstance(source, Path):
        source = onnx.load(source, load_external_data=False)
    return transformed(source, lowering_passes(provider))[0]


def open_session(
    model: Path | onnx.ModelProto,
    *,
    folder: Path | None = None,
    provider: str = "cpu",
    num_threads: int | None = None,
) -> ort.InferenceSession:
    """Open a model.

    Args:
        model: A file, or a model whose external weights lie in `folder`.
        folder: See `model`.
        provider: `cpu` or `cuda`.
        num_threads: Threads for one run; ONNX Runtime's default where None.

    Raises:
        BackendError: If ONNX Runtime is missing, lacks the provider, or refuses the model.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be imported ({error}). Install it: pip install onnxruntime-gpu"
        ) from error
    providers = execution_providers(provider)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if provider == "cuda":
        options.add_session_config_entry(_ASSIGNMENT_KEY, "1")
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    if folder is not None:
        options.add_session_config_entry(_FOLDER_KEY, str(folder))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        session = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime's errors share no base class
        where = model if isinstance(model, Path) else folder
        raise BackendError(f"ONNX Runtime refuses the model in {where}: {error}") from error
    check_provider(session, provider)
    if provider == "cuda":
        log_nodes_on_cpu(session)
    return session
