"""What `bench BUNDLE` times: the bundle, its dense form, and transformers on its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export import names
from dllava_export.backends.kv_plan import bytes_per_row
from dllava_export.backends.registry import DEFAULT_BACKEND
from dllava_export.benchmark.bundle_session import open_bundle
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import BundleError
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.precision import Precision
from dllava_export.runtime.loading import load

if TYPE_CHECKING:
    import onnx

    from dllava_export.benchmark.bench_settings import BenchSettings
    from dllava_export.sparsity import Sparsity


__all__ = ["SessionSubject", "TorchSubject"]

_FIRST_TOKEN = 3  # any ordinary id: what is generated does not change the time


class SessionSubject:
    """A bundle in ONNX Runtime, sparse or in its dense form, or its engines."""

    def __init__(self, folder: Path, settings: BenchSettings, sparsity: Sparsity) -> None:
        self.settings = settings
        if settings.backend == DEFAULT_BACKEND:
            self.session = open_bundle(folder, sparsity, settings.num_threads)
        else:
            self.session = load(folder, settings.backend)
        geometry = self.session.manifest.geometry
        rng = np.random.default_rng(0)
        shape = settings.batch_size, geometry.num_image_tokens, geometry.hidden_size
        self.features = (0.02 * rng.standard_normal(shape)).astype(
            self.session.manifest.precision.activations.numpy
        )
        self.prompts = [_prompt(settings)] * settings.batch_size
        self.num_new = max(settings.decode_lengths) + settings.decode_steps + 2

    def prefill(self) -> None:
        """Feed the prompts; the image features are noise."""
        self.session.prefill(
            self.prompts, image_features=self.features, max_new_tokens=self.num_new
        )

    def fill(self, num_generated: int) -> None:
        """Write rows behind the valid ones, as many as the policy is expected to keep."""
        self.session.fill(num_generated)

    def decode(self) -> None:
        """See `BundleSubject`."""
        self.session.decode([_FIRST_TOKEN] * self.settings.batch_size)

    def kv_bytes(self, length: int) -> int:
        """See `BundleSubject`."""
        self.prefill()
        self.fill(length)
        return int(self.session.cache_lengths.sum()) * self.session.kv_plan.bytes_per_row

    def kv_allocated_bytes(self) -> int:
        """See `BundleSubject`."""
        return self.session.kv_plan.total_bytes


class TorchSubject:
    """transformers' own LLaMA with SDPA and its dynamic cache, on the same weights."""

    def __init__(self, folder: Path, settings: BenchSettings) -> None:
        import torch

        torch.set_num_threads(settings.num_threads)
        self.settings = settings
        self.model = _load_torch(folder)
        manifest = read_manifest(folder, verify=False)
        num_rows = manifest.geometry.num_image_tokens + settings.prompt_text_len
        generator = torch.Generator().manual_seed(0)
        shape = settings.batch_size, num_rows, manifest.geometry.hidden_size
        self.embeds = 0.02 * torch.randn(shape, generator=generator)
        self.token = torch.full((settings.batch_size, 1), _FIRST_TOKEN)
        self.geometry = manifest.geometry
        self.cache: Any = None

    def prefill(self) -> None:
        """Feed noise of as many rows."""
        import torch

        with torch.inference_mode():
            outputs = self.model(inputs_embeds=self.embeds, use_cache=True, logits_to_keep=1)
        self.cache = outputs.past_key_values

    def fill(self, num_generated: int) -> None:
        """Append rows of zeros to every layer's cache."""
        import torch

        if num_generated == 0:
            return
        geometry = self.geometry
        shape = (
            self.settings.batch_size,
            geometry.num_kv_heads,
            num_generated,
            geometry.head_dim,
        )
        for layer in range(geometry.num_layers):
            self.cache.update(torch.zeros(shape), torch.zeros(shape), layer)

    def decode(self) -> None:
        """See `BundleSubject`."""
        import torch

        with torch.inference_mode():
            outputs = self.model(
                input_ids=self.token, past_key_values=self.cache, use_cache=True
            )
        self.cache = outputs.past_key_values

    def kv_bytes(self, length: int) -> int:
        """See `BundleSubject`."""
        rows = self.embeds.shape[1] + length
        row_bytes = bytes_per_row(self.geometry, Precision.of("fp32"))
        return self.settings.batch_size * self.geometry.num_layers * rows * row_bytes

    def kv_allocated_bytes(self) -> int:
        """See `BundleSubject`."""
        return self.kv_bytes(max(self.settings.decode_lengths))


def _load_torch(folder: Path) -> Any:
    """Load the bundle's weights into transformers' LLaMA, mapped from the bundle's files."""
    import onnx
    import torch
    from transformers import LlamaForCausalLM

    from dllava_export.bundles.embedding import EmbeddingTable
    from dllava_export.families.config_file import read_json
    from dllava_export.families.llava import text_config

    llm = folder / layout.LLM_FOLDER
    config_json = read_json(llm / "config.json", "the decoder of a bundle", BundleError)
    manifest = read_manifest(folder, verify=False)
    assert manifest.layout != "onnx"
    config = text_config(config_json, manifest.layout, manifest.geometry.num_layers)
    config._attn_implementation = "sdpa"
    dense = onnx.load(llm / layout.DENSE_DECODER, load_external_data=False)
    state = {}
    for tensor in dense.graph.initializer:
        if tensor.name.endswith((".weight", ".bias")):
            state[tensor.name] = torch.from_numpy(_values(tensor, llm).copy())
    assert manifest.embedding is not None
    table = EmbeddingTable(llm, manifest.embedding).rows
    state[names.TOKEN_EMBEDDING] = torch.from_numpy(np.array(table))
    state.setdefault(names.LM_HEAD, state[names.TOKEN_EMBEDDING])  # where tied
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is not stored
    return model.eval()


def _values(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """Read an initializer; onnx's own reader refuses hard links, which weights may be."""
    import onnx

    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place:
        return onnx.numpy_helper.to_array(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path, offset = folder / place["location"], int(place["offset"])
    return np.memmap(path, dtype, "r", offset, tuple(tensor.dims))


def _prompt(settings: BenchSettings) -> np.ndarray:
    text = np.full(settings.prompt_text_len, _FIRST_TOKEN, np.int64)
    return np.insert(text, 1, IMAGE_PLACEHOLDER_ID)
