"""What a checkpoint's `config.json` says about the model: layout, sizes, predictors.

Source    LLaVA-1.5 and Dynamic-LLaVA configuration keys; transformers' LlavaConfig.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from dllava_export.errors import CheckpointError, UnsupportedModelError
from dllava_export.families.clip_tower import ProjectorConfig
from dllava_export.geometry import PredictorConfig
from dllava_export.names import IMAGE_PLACEHOLDER_ID

__all__ = [
    "ImageSettings",
    "Layout",
    "detect_layout",
    "image_settings",
    "predictor_config",
    "projector_config",
]

Layout = Literal["llava", "dynamic-llava", "llava-hf"]

_HF_IMAGE_TOKEN_ID = 32000  # LlavaConfig's default

_ORIGINAL_MODEL_TYPES = ("llava", "llava_llama", "dynamic_llava_llama")
_DYNAMIC_ARCHITECTURE = "DynamicLlavaLlamaForCausalLM"
_ORIGINAL_ARCHITECTURES = ("LlavaLlamaForCausalLM", _DYNAMIC_ARCHITECTURE)
_HF_ARCHITECTURE = "LlavaForConditionalGeneration"


def detect_layout(config: Mapping[str, Any], *, allow_llama: bool = False) -> Layout:
    """Return how the checkpoint is laid out.

    Args:
        config: The parsed `config.json`.
        allow_llama: Take a plain LLaMA configuration too; for random weights.

    Raises:
        UnsupportedModelError: If the model is of another kind, or quantised.
        CheckpointError: If a Dynamic-LLaVA model has no `sparse_config`.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    if config.get("quantization_config"):
        method = (
            config["quantization_config"].get("quant_method", "unknown")
            if isinstance(config["quantization_config"], Mapping)
            else config["quantization_config"]
        )
        raise UnsupportedModelError(
            f"The checkpoint has a quantization_config (quant_method {method!r}), expected "
            "float32, float16 or bfloat16 weights. Use the checkpoint it was quantised from."
        )
    has_sparse_config = config.get("sparse_config") is not None
    is_nested = model_type == "llava" and "text_config" in config
    if _HF_ARCHITECTURE in architectures or is_nested:
        if has_sparse_config:
            raise UnsupportedModelError(
                f"The checkpoint is a {_HF_ARCHITECTURE} with a sparse_config, expected one "
                "or the other. Use the Dynamic-LLaVA checkpoint in its original layout."
            )
        return "llava-hf"
    is_original = model_type in _ORIGINAL_MODEL_TYPES and (
        not architectures or any(name in _ORIGINAL_ARCHITECTURES for name in architectures)
    )
    if not is_original and not (allow_llama and model_type in ("llama", None)):
        raise UnsupportedModelError(
            f"model_type {model_type!r} with architectures {list(architectures)} is not "
            f"supported, expected one of {', '.join(_ORIGINAL_MODEL_TYPES)} with "
            f"{' or '.join(_ORIGINAL_ARCHITECTURES)}, or {_HF_ARCHITECTURE}. "
            "Use a LLaVA-1.5 or Dynamic-LLaVA checkpoint."
        )
    if has_sparse_config:
        return "dynamic-llava"
    if model_type == "dynamic_llava_llama" or _DYNAMIC_ARCHITECTURE in architectures:
        raise CheckpointError(
            f"config.json names {_DYNAMIC_ARCHITECTURE} but has no sparse_config, expected "
            "the settings of its predictors. Restore config.json from the original checkpoint."
        )
    return "llava"


def projector_config(
    config: Mapping[str, Any],
    layout: Layout,
    in_features: int,
    out_features: int,
    default_type: str = "linear",
) -> ProjectorConfig:
    """Return the projector's configuration.

    Args:
        config: The parsed `config.json`.
        layout: From `detect_layout`.
        in_features: Width of the vision tower.
        out_features: Hidden size of the decoder.
        default_type: Where the original layouts have no `mm_projector_type`.

    Raises:
        UnsupportedModelError: If the projector is not a linear layer or a GELU MLP.
    """
    if layout == "llava-hf":
        hidden_act = config.get("projector_hidden_act", "gelu")
        if hidden_act != "gelu":
            raise UnsupportedModelError(
                f"projector_hidden_act {hidden_act!r} is not supported, expected 'gelu'. "
                "Use a LLaVA-1.5 checkpoint."
            )
        bias = bool(config.get("multimodal_projector_bias", True))
        return ProjectorConfig(in_features, out_features, bias=bias)
    name = str(config.get("mm_projector_type", default_type))
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", name)
    if not match and name != "linear":
        raise UnsupportedModelError(
            f"mm_projector_type {name!r} is not supported, expected 'linear' or 'mlpNx_gelu'. "
            "Use a LLaVA-1.5 or Dynamic-LLaVA checkpoint."
        )
    return ProjectorConfig(in_features, out_features, int(match[1]) if match else 1)


def predictor_config(config: Mapping[str, Any]) -> PredictorConfig | None:
    """Return the predictors' configuration, or None where there is no `sparse_config`.

    Keys that are unknown, or that matter only in training, are ignored.

    Raises:
        UnsupportedModelError: If an instruct predictor is in use.
        CheckpointError: If a value is impossible.
    """
    values = config.get("sparse_config")
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise CheckpointError(
            f"sparse_config is a {type(values).__name__}, expected an object. "
            "Restore config.json from the original checkpoint."
        )
    uses_text = bool(values.get("use_text_predictor", True))
    if uses_text and values.get("use_instruct_predictor", False):
        raise UnsupportedModelError(
            "sparse_config has use_instruct_predictor true, but the instruct predictor is not "
            "supported; expected false, as in the published checkpoints. "
            "Use a checkpoint trained without it."
        )
    names = {field.name for field in dataclasses.fields(PredictorConfig)}
    known = {key: value for key, value in values.items() if key in names}
    known["use_vision_predictor"] = bool(values.get("use_vision_predictor", True))
    uses_output_text = bool(values.get("use_output_text_predictor", True))
    known["has_output_text"] = uses_text and uses_output_text
    try:
        return PredictorConfig(**known)
    except ValueError as error:
        raise CheckpointError(f"sparse_config: {error} Restore config.json.") from error


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How images enter the prompt; see `Checkpoint` for the attributes."""

    vision_feature_layer: int
    vision_feature_select: Literal["patch"]
    image_token_id: int
    image_aspect_ratio: str


def image_settings(
    config: Mapping[str, Any], layout: Layout, num_vision_layers: int
) -> ImageSettings:
    """Return how images enter the prompt.

    Args:
        config: The parsed `config.json`.
        layout: From `detect_layout`.
        num_vision_layers: Blocks of the vision tower.

    Raises:
        UnsupportedModelError: If features other than one layer's patches are used, or the
            prompt needs tokens around the image, or images are cut into tiles.
    """
    if layout == "llava-hf":
        layer = config.get("vision_feature_layer", -2)
        select = config.get("vision_feature_select_strategy", "default")
        select = "patch" if select == "default" else select
        token_id = config.get("image_token_index", config.get("image_token_id"))
        token_id = _HF_IMAGE_TOKEN_ID if token_id is None else token_id
        aspect_ratio = "square"
    else:
        layer = config.get("mm_vision_select_layer", -2)
        select = config.get("mm_vision_select_feature", "patch")
        token_id = IMAGE_PLACEHOLDER_ID
        aspect_ratio = config.get("image_aspect_ratio") or "square"
        _check_image_tokens(config, aspect_ratio)
    # hidden_states of CLIP: the embeddings, then the output of every block.
    if type(layer) is not int or not -num_vision_layers - 1 <= layer <= num_vision_layers:
        raise UnsupportedModelError(
            f"The vision feature layer is {layer!r}, expected one whole number in "
            f"{-num_vision_layers - 1}..{num_vision_layers}. "
            "Use a checkpoint that reads features from one layer."
        )
    if select != "patch":
        raise UnsupportedModelError(
            f"The vision features are selected by {select!r}, expected 'patch' (the class "
            "token is dropped). Use a LLaVA-1.5 or Dynamic-LLaVA checkpoint."
        )
    return ImageSettings(layer, "patch", int(token_id), aspect_ratio)


def _check_image_tokens(config: Mapping[str, Any], aspect_ratio: str) -> None:
    if config.get("mm_use_im_start_end"):
        raise UnsupportedModelError(
            "mm_use_im_start_end is true, expected false: no tokens around the image. "
            "Use a LLaVA-1.5 or Dynamic-LLaVA checkpoint."
        )
    merge_type = config.get("mm_patch_merge_type") or "flat"
    if merge_type != "flat" or aspect_ratio not in ("pad", "square"):
        raise UnsupportedModelError(
            f"Images are prepared with image_aspect_ratio {aspect_ratio!r} and "
            f"mm_patch_merge_type {merge_type!r}, expected 'pad' or 'square' and 'flat'. "
            "Checkpoints that cut images into tiles (LLaVA-1.6) are not supported."
        )
