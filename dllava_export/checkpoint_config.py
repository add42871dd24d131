"""What a checkpoint's `config.json` says about the model: layout, sizes, predictors.

Source    LLaVA-1.5 and Dynamic-LLaVA configuration keys; transformers' LlavaConfig.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dllava_export.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlamaConfig

__all__ = [
    "CLIP_FACTS",
    "LLAMA_KEYS",
    "ImageSettings",
    "Layout",
    "PredictorConfig",
    "ProjectorConfig",
    "detect_layout",
    "image_settings",
    "num_patches",
    "predictor_config",
    "projector_config",
    "read_json",
    "text_config",
    "vision_config",
]

Layout = Literal["llava", "dynamic-llava", "llava-hf"]

ORIGINAL_IMAGE_TOKEN_ID = -200
_HF_IMAGE_TOKEN_ID = 32000  # LlavaConfig's default

_ORIGINAL_MODEL_TYPES = ("llava", "llava_llama", "dynamic_llava_llama")
_DYNAMIC_ARCHITECTURE = "DynamicLlavaLlamaForCausalLM"
_ORIGINAL_ARCHITECTURES = ("LlavaLlamaForCausalLM", _DYNAMIC_ARCHITECTURE)
_HF_ARCHITECTURE = "LlavaForConditionalGeneration"

# The published towers of LLaVA-1.5, so that reading needs no network.
_CLIP_VIT_L14: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_FACTS: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_VIT_L14, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_VIT_L14, "image_size": 224},
}

LLAMA_KEYS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)
_REQUIRED_LLAMA_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_CLIP_KEYS = (
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
# Frequencies that do not depend on the length of the input.
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """The MLP from CLIP features to token embeddings: linear layers, an activation between.

    Attributes:
        in_features: Width of the vision tower.
        out_features: Hidden size of the decoder.
        num_layers: Linear layers; `projector.{0, 2, 4, ...}` in the canonical names.
        hidden_act: `gelu`, the exact one.
        bias: True where the linear layers have a bias.
    """

    in_features: int
    out_features: int
    num_layers: int = 2
    hidden_act: str = "gelu"
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """The trained predictors of a Dynamic-LLaVA checkpoint.

    Attributes:
        d_model: Width of the predictors.
        nhead: Attention heads in the image predictor's blocks.
        dim_feedforward: MLP width of the image predictor's blocks.
        num_layers: Blocks of the image predictor.
        sparse_layer: First decoder layer (0-based) that sees only kept tokens.
        vision_keep_rate: Share of image tokens kept, in (0, 1].
        output_text_keep_rate: Share of generated tokens training aimed to keep, in (0, 1].
        use_vision_predictor: True where there is an image predictor.
        has_output_text: True where there is an output-text predictor.
    """

    d_model: int = 512
    nhead: int = 8
    dim_feedforward: int = 2048
    num_layers: int = 2
    sparse_layer: int = 2
    vision_keep_rate: float = 0.2
    output_text_keep_rate: float = 0.5
    use_vision_predictor: bool = True
    has_output_text: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "nhead", "dim_feedforward", "num_layers", "sparse_layer"):
            value = getattr(self, name)
            if not (type(value) is int and value >= 1):
                raise ValueError(
                    f"{name} must be a whole number of at least 1, got {value!r}."
                )
        if self.d_model % self.nhead or self.d_model % 4:
            raise ValueError(
                f"d_model must be a multiple of nhead ({self.nhead}) and of 4, "
                f"got {self.d_model}."
            )
        for name in ("vision_keep_rate", "output_text_keep_rate"):
            rate = getattr(self, name)
            if type(rate) not in (int, float) or not 0 < rate <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {rate!r}.")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        what: What its folder would be if all was well, for the message: `a checkpoint`.

    Raises:
        CheckpointError: If the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is not {what}: it has no {path.name}. "
            "Name the folder that holds config.json and the weights."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.parent} is not {what}: {path.name} cannot be read as JSON ({error}). "
            "Restore the file."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path.parent} is not {what}: {path.name} holds a JSON {type(value).__name__}, "
            "expected an object. Restore the file."
        )
    return value


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


def _transformers_config(cls: type, name: str, values: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return cls(**values)
    except (StrictDataclassError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The {name} of config.json cannot be read: {reason}. Restore config.json."
        ) from error


def _check_sizes(name: str, config: object, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(config, key)
        if not (type(value) is int and value >= 1):
            raise CheckpointError(
                f"{name} has {key} {value!r}, expected a whole number of at least 1. "
                "Restore config.json."
            )


def text_config(
    config: Mapping[str, Any], layout: Layout, num_decoder_layers: int | None = None
) -> LlamaConfig:
    """Return the decoder's configuration.

    Args:
        config: The parsed `config.json`.
        layout: From `detect_layout`.
        num_decoder_layers: Keep only the first so many layers.

    Raises:
        UnsupportedModelError: If the decoder is not a plain LLaMA.
        CheckpointError: If sizes are missing or impossible.
        ValueError: If `num_decoder_layers` is not in 1..num_hidden_layers.
    """
    from transformers import LlamaConfig

    values: Mapping[str, Any] = config
    if layout == "llava-hf":
        values = config.get("text_config") or {}
        model_type = values.get("model_type", "llama")
        if model_type != "llama":
            raise UnsupportedModelError(
                f"The text model is of type {model_type!r}, expected 'llama'. "
                "Use a LLaVA-1.5 checkpoint with a LLaMA or Vicuna decoder."
            )
    else:
        missing = [key for key in _REQUIRED_LLAMA_KEYS if key not in values]
        if missing:
            raise CheckpointError(
                f"config.json lacks {', '.join(missing)}, expected the sizes of the decoder. "
                "Restore config.json from the original checkpoint."
            )
    known = {key: values[key] for key in LLAMA_KEYS if key in values}
    if config.get("tie_word_embeddings"):
        known["tie_word_embeddings"] = True
    result = _transformers_config(LlamaConfig, "text configuration", known)
    _check_sizes("The text configuration", result, (*_REQUIRED_LLAMA_KEYS, "head_dim"))
    _check_decoder(result)
    num_layers = result.num_hidden_layers
    if num_decoder_layers is not None:
        if not 1 <= num_decoder_layers <= num_layers:
            raise ValueError(
                f"num_decoder_layers must be in 1..{num_layers}, got {num_decoder_layers}."
            )
        result.num_hidden_layers = num_decoder_layers
    return result


def _check_decoder(config: LlamaConfig) -> None:
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"The decoder has hidden_act {config.hidden_act!r}, expected 'silu'. "
            "Use a LLaVA-1.5 checkpoint with a LLaMA or Vicuna decoder."
        )
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"The decoder's rotary embedding has rope_type {rope_type!r}, expected one of "
            f"{', '.join(_ROPE_TYPES)}. Use a checkpoint with fixed frequencies."
        )
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if not num_kv_heads or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise CheckpointError(
            f"The text configuration has num_key_value_heads {num_kv_heads}, expected a "
            f"divisor of num_attention_heads ({num_heads}). Restore config.json."
        )


def vision_config(values: Mapping[str, Any], origin: str) -> CLIPVisionConfig:
    """Return the vision tower's configuration.

    Args:
        values: A CLIP vision configuration, or a CLIP one with a `vision_config` inside.
        origin: Where it comes from, for messages.

    Raises:
        UnsupportedModelError: If it is not a CLIP vision model.
        CheckpointError: If sizes are impossible.
    """
    from transformers import CLIPVisionConfig

    model_type = values.get("model_type", "clip_vision_model")
    if model_type == "clip" and isinstance(values.get("vision_config"), Mapping):
        return vision_config(values["vision_config"], origin)
    if model_type not in ("clip_vision_model", "clip"):
        raise UnsupportedModelError(
            f"The vision tower of {origin} is of type {model_type!r}, expected "
            "'clip_vision_model'. Use a checkpoint with a CLIP vision tower."
        )
    known = {key: values[key] for key in _CLIP_KEYS if key in values}
    result = _transformers_config(CLIPVisionConfig, f"vision configuration of {origin}", known)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    _check_sizes("The vision configuration", result, (*sizes, "image_size", "patch_size"))
    if num_patches(result) < 1:
        raise CheckpointError(
            f"The vision configuration of {origin} has image_size {result.image_size} and "
            f"patch_size {result.patch_size}, expected at least one patch. "
            "Restore config.json."
        )
    return result


def num_patches(config: CLIPVisionConfig) -> int:
    """Return how many patches, and so image tokens, an image has."""
    assert isinstance(config.image_size, int)
    assert isinstance(config.patch_size, int)
    return (config.image_size // config.patch_size) ** 2


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
        token_id = ORIGINAL_IMAGE_TOKEN_ID
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
