"""Write a trained model as a checkpoint folder in the layout of the official code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dllava_export.bundles.bundle_writer import BundleWriter
from dllava_export.checkpoints.checkpoint import Checkpoint
from dllava_export.checkpoints.tensor_source import DTYPE_NAMES, TensorSource, TorchSource
from dllava_export.exporting.weights import write_safetensors
from dllava_export.families.clip_tower import CLIP_FACTS, CLIP_KEYS
from dllava_export.families.llama_decoder import LLAMA_KEYS
from dllava_export.families.llava import LlavaSpec, original_renames
from dllava_export.geometry import PredictorConfig
from dllava_export.precision import NUMBER_FORMATS
from dllava_export.reporting.output_files import write_text
from dllava_export.training.model import PREDICTORS, TrainingModel, canonical_name
from dllava_export.training.settings import TrainingSettings

__all__ = ["checkpoint_config", "write_checkpoint"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

# Newer transformers keep both of these inside rope_parameters.
_TEXT_KEYS = tuple(k for k in LLAMA_KEYS if k not in ("rope_scaling", "rope_theta"))


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
    assert isinstance(checkpoint.spec, LlavaSpec)  # as `build_model` found it
    renames = original_renames(is_linear=checkpoint.spec.projector.num_layers == 1)
    tensors = {
        renames.stored(name): (source, stored.numpy)
        for name, source in sorted(sources.items())
    }
    write_safetensors(out / WEIGHTS, tensors, writer=BundleWriter(progress=progress))
    generation = checkpoint.path / "generation_config.json"
    for path in (*checkpoint.tokenizer_files, *([generation] if generation.is_file() else [])):
        shutil.copyfile(path, out / path.name)
    write_text(
        out / "preprocessor_config.json", json.dumps(checkpoint.preprocessor, indent=2) + "\n"
    )
    config = checkpoint_config(checkpoint, predictors, settings)
    write_text(
        out / CONFIG, json.dumps({**config, "torch_dtype": stored.dtype_name}, indent=2) + "\n"
    )
    return (out / WEIGHTS).stat().st_size


def checkpoint_config(
    checkpoint: Checkpoint, predictors: PredictorConfig | None, settings: TrainingSettings
) -> dict[str, Any]:
    """Return a `config.json` in the original layout, with `sparse_config` for predictors.

    Source: Dynamic-LLaVA; its published checkpoints have model_type `llava_llama` too.
    """
    spec = checkpoint.spec
    assert isinstance(spec, LlavaSpec)  # as `build_model` found it
    text = spec.text_config
    values: dict[str, Any] = {}
    if spec.layout != "llava-hf":
        values = {key: value for key, value in checkpoint.config.items() if key != "dtype"}
        values.pop("sparse_config", None)
    values.update({key: getattr(text, key) for key in _TEXT_KEYS if hasattr(text, key)})
    rope = values.get("rope_parameters") or {}
    values["rope_theta"] = rope.get("rope_theta", 10000.0)  # where older readers look for it
    name = "LlavaLlamaForCausalLM" if predictors is None else "DynamicLlavaLlamaForCausalLM"
    vision = {key: getattr(spec.vision_config, key) for key in CLIP_KEYS}
    num_layers = spec.projector.num_layers
    values |= {
        "architectures": [name],
        "model_type": "llava_llama",
        "image_aspect_ratio": spec.image_aspect_ratio,
        "mm_hidden_size": spec.projector.in_features,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "linear" if num_layers == 1 else f"mlp{num_layers}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": spec.feature_layer,
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
        if all(getattr(checkpoint.spec.vision_config, key) == facts[key] for key in facts):
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
