"""CLIP vision towers and MLP projectors: configuration, module, preprocessing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dllava_export.errors import CheckpointError, UnsupportedModelError
from dllava_export.families.config_file import _check_sizes, _transformers_config

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

__all__ = ["CLIP_FACTS", "ProjectorConfig", "num_patches", "vision_config"]


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


_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images


_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
