"""Write a trained model as a checkpoint folder in the layout of the official code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dllava_export.checkpoints.checkpoint import Checkpoint
from dllava_export.checkpoints.tensor_source import DTYPE_NAMES, TensorSource, TorchSource
from dllava_export.exporting.weights import write_safetensors
from dllava_export.families.clip_tower import CLIP_FACTS
from dllava_export.families.llama_decoder import LLAMA_KEYS
from dllava_export.geometry import PredictorConfig
from dllava_export.precision import NUMBER_FORMATS
from dllava_export.training.model import PREDICTORS, TrainingModel, canonical_name
from dllava_export.training.settings import TrainingSettings

__all__ = ["checkpoint_config", "official_name", "write_checkpoint"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_TOWER = "model.vision_tower.vision_tower.vision_model."
_PREFIXES = {
    "model.": "model.",
    "lm_head.": "lm_head.",
    "projector.": "model.mm_projector.",
    "image_predictor.": "model.image_score_predictor.",
    "output_text_predictor.": "model.output_text_score_predictor.",
}
# Newer transformers keep both of these inside rope_parameters.
_TEXT_KEYS = tuple(k for k in LLAMA_KEYS if k not in ("rope_scaling", "rope_theta"))
_VISION_KEYS = (
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
    "projection_dim",
)


def write_checkpoint(
    out: Path,
    model: TrainingModel,
    checkpoint: Checkpoint,
    predictors: PredictorConfig | None,
    settings: TrainingSettings,
    *,
    progress: bool = False,
) -> int:
    """Write weights, configuration and tokenizer; `config.json` last, over what is complete.

    Frozen tensors are streamed from the checkpoint they came from, unrounded.

    Returns:
        Bytes of the weights.

    Raises:
        CheckpointError: If a value does not fit the precision.
        BundleError: If the folder cannot be written.
    """
    stored = checkpoint.weight_format
    if settings.precision is not None:
        stored = NUMBER_FORMATS[settings.precision]
    sources = _trained_sources(model)
    for name, source in checkpoint.tensors.items():
        if not name.startswith(PREDICTORS):
            sources.setdefault(name, source)
    is_linear = checkpoint.projector.num_layers == 1
    tensors = {
        official_name(name, is_linear): (source, stored.numpy)
        for name, source in sorted(sources.items())
    }
    write_safetensors(out / WEIGHTS, tensors, progress=progress)
    generation = checkpoint.path / "generation_config.json"
    for path in (*checkpoint.tokenizer_files, *([generation] if generation.is_file() else [])):
        shutil.copyfile(path, out / path.name)
    _write_json(out / "preprocessor_config.json", checkpoint.preprocessor)
    config = checkpoint_config(checkpoint, predictors, settings)
    _write_json(out / CONFIG, {**config, "torch_dtype": stored.dtype_name})
    return (out / WEIGHTS).stat().st_size


def official_name(name: str, is_linear: bool = False) -> str:
    """Return how the official code spells a canonical name.

    Args:
        name: As in `Checkpoint.tensors`.
        is_linear: True where the projector is a single layer, which has no number.
    """
    if is_linear and name.startswith("projector.0."):
        return "model.mm_projector." + name.rpartition(".")[2]
    for canonical, stored in _PREFIXES.items():
        if name.startswith(canonical):
            return stored + name.removeprefix(canonical)
    return _TOWER + name.removeprefix("vision_model.")


def checkpoint_config(
    checkpoint: Checkpoint, predictors: PredictorConfig | None, settings: TrainingSettings
) -> dict[str, Any]:
    """Return a `config.json` in the original layout, with `sparse_config` for predictors.

    Source: Dynamic-LLaVA; its published checkpoints have model_type `llava_llama` too.
    """
    text = checkpoint.text_config
    values: dict[str, Any] = {}
    if checkpoint.layout != "llava-hf":
        values = {key: value for key, value in checkpoint.config.items() if key != "dtype"}
        values.pop("sparse_config", None)
    values.update({key: getattr(text, key) for key in _TEXT_KEYS if hasattr(text, key)})
    rope = values.get("rope_parameters") or {}
    values["rope_theta"] = rope.get("rope_theta", 10000.0)  # where older readers look for it
    name = "LlavaLlamaForCausalLM" if predictors is None else "DynamicLlavaLlamaForCausalLM"
    vision = {key: getattr(checkpoint.vision_config, key) for key in _VISION_KEYS}
    num_layers = checkpoint.projector.num_layers
    values |= {
        "architectures": [name],
        "model_type": "llava_llama",
        "image_aspect_ratio": checkpoint.image_aspect_ratio,
        "mm_hidden_size": checkpoint.projector.in_features,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "linear" if num_layers == 1 else f"mlp{num_layers}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": checkpoint.vision_feature_select,
        "mm_vision_select_layer": checkpoint.vision_feature_layer,
        "mm_vision_tower": _tower_name(checkpoint),
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }
    if predictors is not None:
        values["sparse_config"] = _sparse_config(predictors, settings)
    return values


def _sparse_config(predictors: PredictorConfig, settings: TrainingSettings) -> dict[str, Any]:
    return {
        "use_vision_predictor": True,
        "vision_keep_rate": predictors.vision_keep_rate,
        "use_text_predictor": predictors.has_output_text,
        "use_output_text_predictor": predictors.has_output_text,
        "output_text_keep_rate": predictors.output_text_keep_rate,
        "output_text_len_for_training": settings.min_answer_tokens,
        "use_instruct_predictor": False,
        "sparse_layer": predictors.sparse_layer,
        "d_model": predictors.d_model,
        "nhead": predictors.nhead,
        "dim_feedforward": predictors.dim_feedforward,
        "num_layers": predictors.num_layers,
        "mask_loss_weight": settings.mask_loss_weight,
    }


def _tower_name(checkpoint: Checkpoint) -> str:
    """Return the tower's name in the checkpoint read, or that of a published one like it."""
    name = checkpoint.config.get("mm_vision_tower")
    if isinstance(name, str) and name:
        return name
    for published, facts in CLIP_FACTS.items():
        if all(getattr(checkpoint.vision_config, key) == facts[key] for key in facts):
            return published
    return "vision_tower"


def _trained_sources(model: TrainingModel) -> dict[str, TensorSource]:
    return {
        canonical_name(name): TorchSource(
            name,
            DTYPE_NAMES["F32"],
            tuple(parameter.shape),
            tensor=parameter.detach().to("cpu", torch.float32),
        )
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
