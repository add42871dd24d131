"""LLaVA-1.5 and Dynamic-LLaVA: a CLIP tower, an MLP projector and a LLaMA decoder.

Three layouts: `llava` (the original), `dynamic-llava` (the same with predictors) and `llava-hf`
(transformers' `LlavaForConditionalGeneration`).

Source    LLaVA-1.5 and Dynamic-LLaVA configuration keys; transformers' LlavaConfig.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dllava_export.errors import CheckpointError, UnsupportedModelError
from dllava_export.families.config_kinds import LLAVA_KINDS
from dllava_export.families.family import (
    Family,
    Layout,
    ModelSpec,
    OutsideTower,
    Renames,
    Traceable,
)
from dllava_export.geometry import PredictorConfig
from dllava_export.names import IMAGE_PLACEHOLDER_ID

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlamaConfig

    from dllava_export.families.clip_tower import ProjectorConfig


__all__ = ["LlavaFamily", "LlavaSpec", "original_renames", "predictor_config", "text_config"]

_LLAVA, _DYNAMIC, _HF = "llava", "dynamic-llava", "llava-hf"  # the layouts

_HF_IMAGE_TOKEN_ID = 32000  # LlavaConfig's default

_ORIGINAL_MODEL_TYPES = ("llava", "llava_llama", "dynamic_llava_llama")
_BARE_DECODER_TYPES = ("llama", None)
_DYNAMIC_ARCHITECTURE = "DynamicLlavaLlamaForCausalLM"
_ORIGINAL_ARCHITECTURES = ("LlavaLlamaForCausalLM", _DYNAMIC_ARCHITECTURE)
_HF_ARCHITECTURE = "LlavaForConditionalGeneration"

_ORIGINAL_TOWER = "model.vision_tower."
_ORIGINAL_PREFIXES = (
    ("model.", "model."),
    ("lm_head.", "lm_head."),
    ("model.mm_projector.", "projector."),
    ("model.image_score_predictor.", "image_predictor."),
    ("model.output_text_score_predictor.", "output_text_predictor."),
    ("model.instruct_score_predictor.", "instruct_predictor."),
    ("model.vision_tower.vision_tower.vision_model.", ""),
    ("model.vision_tower.vision_tower.", ""),  # newer transformers
)
_LINEAR_PROJECTOR = (  # of a single layer, which has no number
    ("model.mm_projector.weight", "projector.0.weight"),
    ("model.mm_projector.bias", "projector.0.bias"),
)
# transformers' get_checkpoint_conversion_mapping("llava") leads from the first of these two
# layouts to the second. A table for the second one is needed all the same, and what transformers
# says changes with its version, unlike the files on disk: so both are written here.
_HF_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "projector.0."),
    ("multi_modal_projector.linear_2.", "projector.2."),
    ("vision_tower.vision_model.", ""),
    ("vision_tower.", ""),
)
_NEW_HF_PREFIXES = (  # written by transformers 4.52 and later
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
    ("model.multi_modal_projector.linear_1.", "projector.0."),
    ("model.multi_modal_projector.linear_2.", "projector.2."),
    ("model.vision_tower.vision_model.", ""),
    ("model.vision_tower.", ""),
)


@dataclasses.dataclass(frozen=True)
class LlavaSpec(ModelSpec):
    """A LLaVA or Dynamic-LLaVA model.

    Attributes:
        text_config: See `ModelSpec`.
        vision_config: See `ModelSpec`.
        projector: The MLP from the tower to the decoder.
        feature_layer: Index into the tower's hidden states; -2 is the output of the last block
            but one.
    """

    text_config: LlamaConfig
    vision_config: CLIPVisionConfig
    projector: ProjectorConfig
    feature_layer: int

    def decoder(self) -> Traceable:
        """See `ModelSpec`."""
        from dllava_export.families.llama_decoder import traceable_llama

        return traceable_llama(self.text_config)

    def visual(self) -> Traceable:
        """Return CLIP tower and projector.

        pixel_values [batch, 3, image_size, image_size] → image_features [batch,
        num_image_tokens, hidden_size].
        """
        from dllava_export.families.clip_tower import traceable_clip

        return traceable_clip(self.vision_config, self.projector, self.feature_layer)

    def preprocessor(self) -> dict[str, Any]:
        """Return the settings of CLIP's image processor."""
        from dllava_export.families.clip_tower import clip_preprocessor

        assert isinstance(self.vision_config.image_size, int)  # checked by `vision_config`
        return clip_preprocessor(self.vision_config.image_size)


class LlavaFamily(Family):
    """LLaVA-1.5 and Dynamic-LLaVA; see `Family`."""

    name = "llava"
    title = "LLaVA-1.5 or Dynamic-LLaVA"
    architectures = (*_ORIGINAL_ARCHITECTURES, _HF_ARCHITECTURE)
    config_kinds = LLAVA_KINDS

    def detect(
        self, config: Mapping[str, Any], *, bare_decoder: bool = False
    ) -> Layout | None:
        """See `Family`. A bare decoder is a LLaMA."""
        model_type = config.get("model_type")
        architectures = config.get("architectures") or []
        has_sparse_config = config.get("sparse_config") is not None
        is_nested = model_type == "llava" and "text_config" in config
        if _HF_ARCHITECTURE in architectures or is_nested:
            if has_sparse_config:
                raise UnsupportedModelError(
                    f"The checkpoint is a {_HF_ARCHITECTURE} with a sparse_config, expected "
                    "one or the other. Use the Dynamic-LLaVA checkpoint in its original layout."
                )
            return _HF
        is_original = model_type in _ORIGINAL_MODEL_TYPES and (
            not architectures or any(name in _ORIGINAL_ARCHITECTURES for name in architectures)
        )
        if not is_original and not (bare_decoder and model_type in _BARE_DECODER_TYPES):
            return None
        if has_sparse_config:
            return _DYNAMIC
        if model_type == "dynamic_llava_llama" or _DYNAMIC_ARCHITECTURE in architectures:
            raise CheckpointError(
                f"config.json names {_DYNAMIC_ARCHITECTURE} but has no sparse_config, expected "
                "the settings of its predictors. Restore config.json from the original "
                "checkpoint."
            )
        return _LLAVA

    def renames(
        self, config: Mapping[str, Any], layout: Layout, keys: Iterable[str]
    ) -> Renames:
        """See `Family`."""
        if layout != _HF:
            return original_renames(is_linear=_projector_layers(config) == 1)
        is_new = any(key.startswith("model.") for key in keys)
        return Renames(_NEW_HF_PREFIXES if is_new else _HF_PREFIXES)

    def outside_tower(self, config: Mapping[str, Any], layout: Layout) -> OutsideTower | None:
        """Return what `mm_vision_tower` names; checkpoints of llava-hf hold their tower."""
        from dllava_export.families.clip_tower import CLIP_FACTS, CLIP_RENAMES

        if layout == _HF:
            return None
        name = config.get("mm_vision_tower") or config.get("vision_tower")
        name = name if isinstance(name, str) else None
        return OutsideTower(
            config_key="mm_vision_tower",
            name=name,
            stored_prefix=_ORIGINAL_TOWER,
            config=config.get("vision_config") or CLIP_FACTS.get(name or ""),
            renames=CLIP_RENAMES,
        )

    def describe(
        self,
        config: Mapping[str, Any],
        layout: Layout,
        *,
        tower: Mapping[str, Any] | None = None,
        preprocessor: Mapping[str, Any] | None = None,
        num_decoder_layers: int | None = None,
    ) -> LlavaSpec:
        """See `Family`."""
        from dllava_export.families.clip_tower import num_patches, vision_config

        is_hf = layout == _HF
        inside = (config.get("vision_config") or {}) if is_hf else (tower or {})
        vision = vision_config(inside, str(config.get("mm_vision_tower") or "config.json"))
        whole = text_config(config, layout)
        text = text_config(config, layout, num_decoder_layers)
        predictors = predictor_config(config)
        if predictors is not None and predictors.sparse_layer >= whole.num_hidden_layers:
            raise CheckpointError(
                f"sparse_config has sparse_layer {predictors.sparse_layer}, expected at most "
                f"{whole.num_hidden_layers - 1}, the decoder's last layer. Restore config.json."
            )
        aspect_ratio = "pad" if (preprocessor or {}).get("do_pad") else "square"
        if not is_hf:
            aspect_ratio = config.get("image_aspect_ratio") or "square"
            _check_image_tokens(config, aspect_ratio)
        return LlavaSpec(
            layout=layout,
            text_config=text,
            vision_config=vision,
            predictors=predictors,
            num_stored_layers=whole.num_hidden_layers,
            num_image_tokens=num_patches(vision),
            image_token_id=_image_token_id(config, layout),
            image_aspect_ratio=aspect_ratio,
            chat_template="checkpoint" if is_hf else "vicuna_v1",
            projector=_projector_config(config, layout, vision, text),
            feature_layer=_feature_layer(config, layout, vision.num_hidden_layers),
        )


def original_renames(*, is_linear: bool) -> Renames:
    """Return how the official code spells canonical names.

    Args:
        is_linear: True where the projector is a single layer.
    """
    return Renames((*(_LINEAR_PROJECTOR if is_linear else ()), *_ORIGINAL_PREFIXES))


def text_config(
    config: Mapping[str, Any], layout: Layout, num_decoder_layers: int | None = None
) -> LlamaConfig:
    """Return the decoder's configuration.

    Args:
        config: The parsed `config.json`.
        layout: From `LlavaFamily.detect`.
        num_decoder_layers: Keep only the first so many layers.

    Raises:
        UnsupportedModelError: If the decoder is not a plain LLaMA.
        CheckpointError: If sizes are missing or impossible.
        SettingError: If `num_decoder_layers` is not in 1..num_hidden_layers.
    """
    from dllava_export.families.llama_decoder import REQUIRED_LLAMA_KEYS, llama_config

    values: Mapping[str, Any] = config
    if layout == _HF:
        values = config.get("text_config") or {}
        model_type = values.get("model_type", "llama")
        if model_type != "llama":
            raise UnsupportedModelError(
                f"The text model is of type {model_type!r}, expected 'llama'. "
                "Use a LLaVA-1.5 checkpoint with a LLaMA or Vicuna decoder."
            )
    else:
        missing = [key for key in REQUIRED_LLAMA_KEYS if key not in values]
        if missing:
            raise CheckpointError(
                f"config.json lacks {', '.join(missing)}, expected the sizes of the decoder. "
                "Restore config.json from the original checkpoint."
            )
    if config.get("tie_word_embeddings"):  # llava-hf has it outside its text_config
        values = {**values, "tie_word_embeddings": True}
    return llama_config(values, num_decoder_layers)


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


def _projector_layers(config: Mapping[str, Any]) -> int:
    """Return the number of linear layers of a projector in the original layouts."""
    is_bare = config.get("model_type") in _BARE_DECODER_TYPES
    default = "mlp2x_gelu" if is_bare else "linear"
    name = str(config.get("mm_projector_type", default))
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", name)
    if not match and name != "linear":
        raise UnsupportedModelError(
            f"mm_projector_type {name!r} is not supported, expected 'linear' or 'mlpNx_gelu'. "
            "Use a LLaVA-1.5 or Dynamic-LLaVA checkpoint."
        )
    return int(match[1]) if match else 1


def _projector_config(
    config: Mapping[str, Any], layout: Layout, vision: CLIPVisionConfig, text: LlamaConfig
) -> ProjectorConfig:
    from dllava_export.families.clip_tower import ProjectorConfig

    if layout != _HF:
        num_layers = _projector_layers(config)
        return ProjectorConfig(vision.hidden_size, text.hidden_size, num_layers)
    hidden_act = config.get("projector_hidden_act", "gelu")
    if hidden_act != "gelu":
        raise UnsupportedModelError(
            f"projector_hidden_act {hidden_act!r} is not supported, expected 'gelu'. "
            "Use a LLaVA-1.5 checkpoint."
        )
    bias = bool(config.get("multimodal_projector_bias", True))
    return ProjectorConfig(vision.hidden_size, text.hidden_size, bias=bias)


def _image_token_id(config: Mapping[str, Any], layout: Layout) -> int:
    if layout != _HF:
        return IMAGE_PLACEHOLDER_ID
    token_id = config.get("image_token_index", config.get("image_token_id"))
    return _HF_IMAGE_TOKEN_ID if token_id is None else int(token_id)


def _feature_layer(config: Mapping[str, Any], layout: Layout, num_layers: int) -> int:
    """Return which of the tower's hidden states are the features, class token dropped."""
    if layout == _HF:
        layer = config.get("vision_feature_layer", -2)
        select = config.get("vision_feature_select_strategy", "default")
        select = "patch" if select == "default" else select
    else:
        layer = config.get("mm_vision_select_layer", -2)
        select = config.get("mm_vision_select_feature", "patch")
    # hidden_states of CLIP: the embeddings, then the output of every block.
    if type(layer) is not int or not -num_layers - 1 <= layer <= num_layers:
        raise UnsupportedModelError(
            f"The vision feature layer is {layer!r}, expected one whole number in "
            f"{-num_layers - 1}..{num_layers}. "
            "Use a checkpoint that reads features from one layer."
        )
    if select != "patch":
        raise UnsupportedModelError(
            f"The vision features are selected by {select!r}, expected 'patch' (the class "
            "token is dropped). Use a LLaVA-1.5 or Dynamic-LLaVA checkpoint."
        )
    return layer


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
