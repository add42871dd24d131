"""CLIP vision towers and MLP projectors: configuration, module, preprocessing."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import ACT2FN

from dllava_export import names
from dllava_export.errors import CheckpointError, UnsupportedModelError
from dllava_export.families.config_file import check_kinds, check_sizes, transformers_config
from dllava_export.families.config_kinds import CLIP_KINDS
from dllava_export.families.family import Renames, Traceable

__all__ = [
    "CLIP_FACTS",
    "CLIP_KEYS",
    "CLIP_RENAMES",
    "ClipVisual",
    "ProjectorConfig",
    "canonical_tower_name",
    "clip_features",
    "clip_preprocessor",
    "num_patches",
    "projector_module",
    "traceable_clip",
    "vision_config",
]

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


CLIP_KEYS = tuple(CLIP_KINDS)


# The folder of a tower may hold a whole CLIP model, with a text tower.
CLIP_RENAMES = Renames(
    (("vision_model.", ""), ("", "")),
    ignored=re.compile(r"(text_model|text_projection|visual_projection)\.|logit_scale$"),
)
"""How the folder of a CLIP model spells the names of transformers' `CLIPVisionModel`."""

_MAX_PATCHES = 1 << 16
_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


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
    model_type = values.get("model_type", "clip_vision_model")
    if model_type == "clip" and isinstance(values.get("vision_config"), Mapping):
        return vision_config(values["vision_config"], origin)
    if model_type not in ("clip_vision_model", "clip"):
        raise UnsupportedModelError(
            f"The vision tower of {origin} is of type {model_type!r}, expected "
            "'clip_vision_model'. Use a checkpoint with a CLIP vision tower."
        )
    check_kinds(values, CLIP_KINDS, f"The vision configuration of {origin}")
    known = {key: values[key] for key in CLIP_KEYS if key in values}
    result = transformers_config(CLIPVisionConfig, f"vision configuration of {origin}", known)
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
    )
    check_sizes("The vision configuration", result, (*sizes, "image_size", "patch_size"))
    if not 1 <= num_patches(result) <= _MAX_PATCHES:
        raise CheckpointError(
            f"The vision configuration of {origin} has image_size {result.image_size} and "
            f"patch_size {result.patch_size}, expected 1 to {_MAX_PATCHES} patches. "
            "Restore config.json."
        )
    return result


def num_patches(config: CLIPVisionConfig) -> int:
    """Return how many patches, and so image tokens, an image has."""
    assert isinstance(config.image_size, int)
    assert isinstance(config.patch_size, int)
    return (config.image_size // config.patch_size) ** 2


class ClipVisual(torch.nn.Module):
    """Hidden states of one tower layer, class token dropped, projected."""

    def __init__(
        self, tower: CLIPVisionModel, projector: torch.nn.Module, feature_layer: int
    ) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.feature_layer = feature_layer

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return [num_images, num_patches, out_features] of [num_images, 3, size, size]."""
        return self.projector(clip_features(self.tower, pixel_values, self.feature_layer))


def clip_features(
    tower: CLIPVisionModel, pixel_values: torch.Tensor, feature_layer: int
) -> torch.Tensor:
    """Return the hidden states of one layer, without the class token.

    Args:
        tower: The tower.
        pixel_values: [num_images, 3, image_size, image_size].
        feature_layer: Index into the tower's hidden states: the embeddings, then the output of
            every block; -2 is the output of the last block but one.

    Returns:
        [num_images, num_patches, hidden_size].
    """
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    return states[feature_layer][:, 1:]


def projector_module(config: ProjectorConfig) -> torch.nn.Sequential:
    """Return Linear, (activation, Linear)...: as numbered in the original checkpoints."""
    out_features = config.out_features
    layers = [torch.nn.Linear(config.in_features, out_features, bias=config.bias)]
    for _ in range(1, config.num_layers):
        layers += [
            ACT2FN[config.hidden_act],
            torch.nn.Linear(out_features, out_features, bias=config.bias),
        ]
    return torch.nn.Sequential(*layers)


def canonical_tower_name(name: str) -> str:
    """Return the canonical name of a parameter of a module that calls its tower `tower`.

    Tower parameters have no prefix: neither the module's, nor the `vision_model.` that older
    versions of transformers put in between.
    """
    inside = name.removeprefix("tower.")
    return name if inside == name else inside.removeprefix("vision_model.")


def traceable_clip(
    config: CLIPVisionConfig, projector: ProjectorConfig, feature_layer: int
) -> Traceable:
    """Return tower and projector as one module.

    pixel_values [batch, 3, image_size, image_size] → image_features [batch, num_patches,
    out_features].
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    size = config.image_size
    assert isinstance(size, int)  # checked by `vision_config`
    with torch.device("meta"):
        tower = CLIPVisionModel(config)
        visual = ClipVisual(tower, projector_module(projector), feature_layer)
        example = (torch.zeros(2, config.num_channels, size, size),)
    return Traceable(
        visual,
        example,
        inputs={names.PIXEL_VALUES: {0: names.BATCH}},
        outputs=(names.IMAGE_FEATURES,),
        buffers={"position_ids": torch.arange(num_patches(config) + 1).unsqueeze(0)},
        canonical=canonical_tower_name,
    )


def clip_preprocessor(image_size: int) -> dict[str, Any]:
    """Return the settings of CLIP's image processor at a size in pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(_IMAGE_MEAN),
        "image_std": list(_IMAGE_STD),
    }
