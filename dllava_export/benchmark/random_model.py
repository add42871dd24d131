"""Make a decoder with random weights: one file that every subject reads, and a bundle.

The output-text predictor of a random model would keep nearly all tokens or none, since its two
logits differ by a constant more than by the token. The last bias is therefore moved so that the
wanted share of the tokens that the suite generates is kept. On other tokens the share is another:
what precedes them moves all logits the same way.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.benchmark.geometries import SuiteGeometry, SuiteSettings
from dllava_export.reporting import resources

if TYPE_CHECKING:
    import torch

    from dllava_export.checkpoints.checkpoint import Checkpoint


__all__ = ["RandomModel", "make_random_model", "random_token_ids"]

_LAST_BIAS = "output_mlp.7.bias"
_TEXT_PREDICTOR = "output_text_predictor."
_WEIGHTS_FILE = "model.safetensors"
_FIRST_ID = 3  # lower ones are special
_PATCH_SIZE = 14
_GENERATED_SEED = 0


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """Where the model of one geometry lies.

    Attributes:
        geometry: Its sizes.
        settings: What is measured.
        llama: A folder that transformers' `LlamaForCausalLM` loads: the dense decoder.
        bundle: The sparse bundle, its weights hard links to the former where possible.
        scratch: A folder for what a subject makes from them.
    """

    geometry: SuiteGeometry
    settings: SuiteSettings
    llama: Path
    bundle: Path
    scratch: Path

    @property
    def weights(self) -> Path:
        """The decoder's weights, float32 safetensors with transformers' names."""
        return self.llama / _WEIGHTS_FILE

    @property
    def max_tokens(self) -> int:
        """Cache rows that the largest case needs."""
        return max(self.settings.max_tokens(c.decode_rounds) for c in self.geometry.cases)

    def prompt_ids(self, batch_size: int, num_generated: int = 0) -> np.ndarray:
        """Return token ids [batch, num_prompt_tokens + num_generated] int64.

        A shorter prompt is the beginning of a longer one.
        """
        longest = self.settings.num_prompt_tokens + self.settings.decode_lengths[-1]
        ids = random_token_ids(self.geometry, (batch_size, longest), seed=batch_size)
        return ids[:, : self.settings.num_prompt_tokens + num_generated]

    def generated_ids(self) -> np.ndarray:
        """Return the answer to the first prompt, [kv_length] int64; random like all tokens."""
        return random_token_ids(
            self.geometry, (self.settings.kv_length,), seed=_GENERATED_SEED
        )


def random_token_ids(
    geometry: SuiteGeometry, shape: tuple[int, ...], *, seed: int
) -> np.ndarray:
    """Return ordinary token ids, int64."""
    return np.random.default_rng(seed).integers(_FIRST_ID, geometry.vocab_size, shape)


def make_random_model(
    geometry: SuiteGeometry, settings: SuiteSettings, folder: Path
) -> RandomModel:
    """Write decoder and bundle into an existing folder.

    Raises:
        DllavaExportError: If the sizes are impossible.
    """
    from dllava_export.checkpoints.checkpoint import random_checkpoint
    from dllava_export.checkpoints.files import read_tensors
    from dllava_export.exporting.exporter import export_checkpoint

    config = folder / "config.json"
    _write_json(config, _checkpoint_config(geometry, settings))
    checkpoint = random_checkpoint(config)
    model = RandomModel(
        geometry, settings, folder / "llama", folder / "bundle", folder / "own"
    )
    with resources.stage("writing random weights"):
        _write_llama(model, checkpoint)
    with resources.stage("calibrating the output-text predictor"):
        predictor = _write_calibrated_predictor(model, checkpoint, folder / "predictor")
    stored = read_tensors(model.llama)
    if geometry.ties_embeddings:
        stored[names.LM_HEAD] = stored[names.TOKEN_EMBEDDING]
    tensors = checkpoint.tensors | stored | read_tensors(predictor)
    export_checkpoint(
        dataclasses.replace(checkpoint, tensors=tensors), model.bundle, link=True
    )
    model.scratch.mkdir()
    return model


def _checkpoint_config(geometry: SuiteGeometry, settings: SuiteSettings) -> dict[str, object]:
    """Return a Dynamic-LLaVA configuration with a tower that is small: it is not measured."""
    return {
        "model_type": "llava_llama",
        "architectures": ["DynamicLlavaLlamaForCausalLM"],
        **geometry.llama_config(),
        "mm_vision_tower": "vision_tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": _PATCH_SIZE * settings.image_tokens_per_side,
            "patch_size": _PATCH_SIZE,
        },
        "sparse_config": {
            "d_model": geometry.predictor_width,
            "dim_feedforward": 4 * geometry.predictor_width,
            "nhead": geometry.predictor_heads,
            "num_layers": 2,
            "sparse_layer": settings.sparse_layer,
            "vision_keep_rate": settings.image_keep_rate,
            "output_text_keep_rate": settings.output_text_keep_rate,
            "use_vision_predictor": True,
            "use_text_predictor": True,
            "use_output_text_predictor": True,
            "use_instruct_predictor": False,
        },
    }


def _write_llama(model: RandomModel, checkpoint: Checkpoint) -> None:
    """Write configuration, weights and a tokenizer, without which some converters stop."""
    from dllava_export.exporting.weights import write_safetensors

    model.llama.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        **model.geometry.llama_config(),
    }
    _write_json(model.llama / "config.json", config)
    _write_json(model.llama / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_tokenizer(model)
    float32 = np.dtype(np.float32)
    tensors = {
        name: (source, float32)
        for name, source in checkpoint.tensors.items()
        if name.startswith("model.")
        or (name == names.LM_HEAD and not model.geometry.ties_embeddings)
    }
    write_safetensors(model.weights, tensors)


def _write_tokenizer(model: RandomModel) -> None:
    from tokenizers import Tokenizer, models

    words = {f"<{index}>": index for index in range(model.geometry.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="<0>")).save(
        str(model.llama / "tokenizer.json")
    )
    _write_json(
        model.llama / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
    )


def _write_calibrated_predictor(
    model: RandomModel, checkpoint: Checkpoint, folder: Path
) -> Path:
    """Write an output-text predictor that keeps the wanted share; return its folder."""
    import torch
    from safetensors.torch import save_file

    from dllava_export.families.predictors import OutputTextPredictor, init_predictor

    assert checkpoint.spec.predictors is not None  # `_checkpoint_config` has one
    predictor = OutputTextPredictor(model.geometry.hidden_size, checkpoint.spec.predictors)
    init_predictor(predictor, torch.Generator().manual_seed(0))
    bias = predictor.get_parameter(_LAST_BIAS)
    with torch.inference_mode():
        logits = predictor(_generated_states(model))
        margins = logits[..., 0] - logits[..., 1]
        dropped = 1 - model.settings.output_text_keep_rate
        bias[1] += margins.quantile(dropped)
    folder.mkdir()
    values = {_TEXT_PREDICTOR + key: value for key, value in predictor.state_dict().items()}
    save_file(values, folder / _WEIGHTS_FILE)
    return folder


def _generated_states(model: RandomModel) -> torch.Tensor:
    """Return what enters `sparse_layer` for the generated tokens, [1, tokens, hidden_size]."""
    import torch
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaModel

    num_layers = model.settings.sparse_layer
    config = LlamaConfig(**model.geometry.llama_config() | {"num_hidden_layers": num_layers})
    with torch.device("meta"):
        llama = LlamaModel(config)
    with safe_open(model.weights, framework="pt") as file:
        state = {key: file.get_tensor("model." + key) for key in llama.state_dict()}
    llama.load_state_dict(state, assign=True)
    llama.rotary_emb = type(llama.rotary_emb)(config)  # its buffer is not stored
    llama.set_submodule("norm", torch.nn.Identity())  # the predictor reads the residual stream
    ids = np.append(model.prompt_ids(1), model.generated_ids())
    with torch.inference_mode():
        states = llama(torch.from_numpy(ids)[None]).last_hidden_state
    return states[:, model.settings.num_prompt_tokens :]


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
