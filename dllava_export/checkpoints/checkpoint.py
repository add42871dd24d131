"""Read a checkpoint: which model it is, and where each of its tensors lies.

Three layouts are read: original LLaVA-1.5, Dynamic-LLaVA (the same with predictors) and
transformers' `LlavaForConditionalGeneration`. Only `config.json` and the headers of the weight
files are read; see `TensorSource.read` for values.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dllava_export.checkpoints.canonical import (
    ModelShapes,
    canonical_tensors,
    is_tower_key,
    tower_tensors,
)
from dllava_export.checkpoints.files import (
    HUB_ID,
    download,
    download_config,
    read_tensors,
    resolve_folder,
)
from dllava_export.checkpoints.tensor_source import DTYPE_NAMES, RandomSource, TensorSource
from dllava_export.errors import CheckpointError
from dllava_export.families import llava
from dllava_export.families.clip_tower import (
    _IMAGE_MEAN,
    _IMAGE_STD,
    CLIP_FACTS,
    ProjectorConfig,
    num_patches,
    vision_config,
)
from dllava_export.families.config_file import read_json
from dllava_export.families.llama_decoder import text_config
from dllava_export.families.llava import ImageSettings, Layout
from dllava_export.families.module_shapes import tower_shapes
from dllava_export.geometry import PredictorConfig
from dllava_export.precision import (
    BF16,
    FP16,
    FP32,
    NUMBER_FORMATS,
    NumberFormat,
    format_of_dtype,
)

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlamaConfig


__all__ = ["Checkpoint", "random_checkpoint", "read_checkpoint"]

logger = logging.getLogger(__name__)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A LLaVA or Dynamic-LLaVA checkpoint, its tensors not loaded.

    Attributes:
        path: Its folder.
        config: Its `config.json`.
        layout: How it is laid out on disk.
        text_config: The decoder, cut to the layers asked for.
        vision_config: The vision tower.
        projector: The MLP from the tower to the decoder.
        vision_feature_layer: Index into the tower's hidden states; -2 is the output of the
            last block but one.
        vision_feature_select: `patch`: the class token is dropped.
        num_image_tokens: Rows an image takes in the prompt.
        image_token_id: Id that stands for the image in a prompt; -200 in the original layouts.
        image_aspect_ratio: `pad` (to a square, before resizing) or `square` (resize the short
            side and crop the centre).
        sparse_config: The predictors, or None for plain LLaVA.
        tensors: Canonical name → tensor; see `checkpoint_layout`.
        weight_format: Of the decoder's weights; where they differ, the one that holds all.
        tokenizer_files: Tokenizer files in the folder.
        preprocessor: CLIP image processor settings, as in `preprocessor_config.json`.
    """

    path: Path
    config: dict[str, Any] = dataclasses.field(repr=False)
    layout: Layout
    text_config: LlamaConfig
    vision_config: CLIPVisionConfig
    projector: ProjectorConfig
    vision_feature_layer: int
    vision_feature_select: Literal["patch"]
    num_image_tokens: int
    image_token_id: int
    image_aspect_ratio: str
    sparse_config: PredictorConfig | None
    tensors: dict[str, TensorSource] = dataclasses.field(repr=False)
    weight_format: NumberFormat
    tokenizer_files: tuple[Path, ...]
    preprocessor: dict[str, Any] = dataclasses.field(repr=False)

    @property
    def has_predictors(self) -> bool:
        """True where there is at least an image predictor."""
        return self.sparse_config is not None and self.sparse_config.use_vision_predictor

    @property
    def has_tokenizer(self) -> bool:
        """True where the folder holds a tokenizer."""
        names = {path.name for path in self.tokenizer_files}
        return bool(names & {"tokenizer.json", "tokenizer.model"})


@dataclasses.dataclass(frozen=True)
class _Tower:
    """Where the vision tower comes from.

    Attributes:
        config: Its configuration.
        folder: Its folder, or None where nothing but facts are known.
        name: What `mm_vision_tower` says, for messages.
    """

    config: CLIPVisionConfig
    folder: Path | None
    name: str


def read_checkpoint(
    location: str | Path, *, num_decoder_layers: int | None = None
) -> Checkpoint:
    """Read a checkpoint's configuration and the headers of its weight files.

    Args:
        location: A folder, or a hub id (`owner/name`), which is downloaded.
        num_decoder_layers: Keep only the first so many decoder layers; all by default.

    Raises:
        CheckpointError: If the checkpoint is not found, damaged or incomplete.
        UnsupportedModelError: If it is a model of another kind.
        ValueError: If `num_decoder_layers` is not in 1..num_hidden_layers.
    """
    path = resolve_folder(location)
    config = read_json(path / "config.json", "a checkpoint")
    layout = llava.detect_layout(config)
    stored = read_tensors(path)
    has_tower = any(is_tower_key(key, layout) for key in stored)
    tower = _find_tower(config, layout, path, has_weights=has_tower)
    shapes = tower_shapes(tower.config)
    model = _model_shapes(config, layout, tower.config.hidden_size, num_decoder_layers)
    images = llava.image_settings(config, layout, tower.config.num_hidden_layers)
    tensors = canonical_tensors(stored, path, layout, model, shapes if has_tower else None)
    if not has_tower:
        tensors |= _tower_weights(tower, shapes, path)
    return _make_checkpoint(path, config, layout, images, model, tower, tensors)


def random_checkpoint(
    config_json: str | Path, seed: int = 0, *, num_decoder_layers: int | None = None
) -> Checkpoint:
    """Return a checkpoint of the right shape with random weights, to try out and to time.

    Args:
        config_json: A `config.json` of any layout, or that of a plain LLaMA with a
            `vision_config` object or `mm_vision_tower`, and a `sparse_config` for predictors.
        seed: Seed of the weights.
        num_decoder_layers: Keep only the first so many decoder layers; all by default.

    Raises:
        CheckpointError: If the configuration is not found or incomplete.
        UnsupportedModelError: If it is a model of another kind.
        ValueError: If `num_decoder_layers` is not in 1..num_hidden_layers.
    """
    file = Path(config_json)
    config = read_json(file, "a folder with a configuration")
    layout = llava.detect_layout(config, allow_llama=True)
    tower = _find_tower(config, layout, file.parent, has_weights=True)
    default_type = "mlp2x_gelu" if config.get("model_type") in ("llama", None) else "linear"
    model = _model_shapes(
        config, layout, tower.config.hidden_size, num_decoder_layers, default_type
    )
    images = llava.image_settings(config, layout, tower.config.num_hidden_layers)
    dtype = _config_dtype(config)
    shapes = model.shapes() | tower_shapes(tower.config)
    tensors: dict[str, TensorSource] = {
        name: RandomSource(name, DTYPE_NAMES[dtype], shape, None, seed)
        for name, shape in shapes.items()
    }
    if model.text.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return _make_checkpoint(file.parent, config, layout, images, model, tower, tensors)


def _config_dtype(config: Mapping[str, Any]) -> str:
    name = config.get("torch_dtype") or config.get("dtype") or "float32"
    known = format_of_dtype(name)
    if known is None:
        names = ", ".join(f.dtype_name for f in NUMBER_FORMATS.values())
        raise CheckpointError(
            f"torch_dtype is {name!r}, expected one of {names}. Change it in config.json."
        )
    return known.stored_name


def _model_shapes(
    config: Mapping[str, Any],
    layout: Layout,
    vision_width: int,
    num_decoder_layers: int | None,
    default_projector: str = "linear",
) -> ModelShapes:
    whole = text_config(config, layout)
    text = text_config(config, layout, num_decoder_layers)
    predictors = llava.predictor_config(config)
    if predictors is not None and predictors.sparse_layer >= whole.num_hidden_layers:
        raise CheckpointError(
            f"sparse_config has sparse_layer {predictors.sparse_layer}, expected at most "
            f"{whole.num_hidden_layers - 1}, the decoder's last layer. Restore config.json."
        )
    projector = llava.projector_config(
        config, layout, vision_width, text.hidden_size, default_projector
    )
    return ModelShapes(text, projector, predictors, whole.num_hidden_layers)


def _make_checkpoint(
    path: Path,
    config: dict[str, Any],
    layout: Layout,
    images: ImageSettings,
    model: ModelShapes,
    tower: _Tower,
    tensors: dict[str, TensorSource],
) -> Checkpoint:
    preprocessor = _preprocessor(path, tower)
    pads = layout == "llava-hf" and preprocessor.get("do_pad")
    checkpoint = Checkpoint(
        path=path,
        config=config,
        layout=layout,
        text_config=model.text,
        vision_config=tower.config,
        projector=model.projector,
        vision_feature_layer=images.vision_feature_layer,
        vision_feature_select=images.vision_feature_select,
        num_image_tokens=num_patches(tower.config),
        image_token_id=images.image_token_id,
        image_aspect_ratio="pad" if pads else images.image_aspect_ratio,
        sparse_config=model.predictors,
        tensors=tensors,
        weight_format=_weight_format(tensors),
        tokenizer_files=tuple(
            path / name for name in _TOKENIZER_FILES if (path / name).is_file()
        ),
        preprocessor=preprocessor,
    )
    logger.info(
        "%s: %s, %d decoder layers of %d, %d tensors, %.1f GiB",
        path,
        layout,
        model.text.num_hidden_layers,
        model.num_stored_layers,
        len(tensors),
        math.fsum(source.num_bytes for source in tensors.values()) / 2**30,
    )
    return checkpoint


def _weight_format(tensors: Mapping[str, TensorSource]) -> NumberFormat:
    decoder = {
        source.dtype
        for name, source in tensors.items()
        if name.startswith(("model.", "lm_head."))
    }
    return next((known for known in (FP16, BF16) if decoder == {known.numpy}), FP32)


def _find_tower(
    config: Mapping[str, Any], layout: Layout, path: Path, *, has_weights: bool
) -> _Tower:
    """Find the vision tower's configuration, and its folder where there is one.

    Args:
        config: The checkpoint's `config.json`.
        layout: The checkpoint's layout.
        path: The checkpoint's folder.
        has_weights: True where the tower's weights need no folder.
    """
    inside = config.get("vision_config")
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    if layout == "llava-hf" or (has_weights and inside):
        inside = vision_config(inside or {}, str(path))
        return _Tower(inside, None, str(path))
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"config.json of {path} has no mm_vision_tower, expected the folder or hub id of "
            "its CLIP vision tower. Add it."
        )
    folder = path / name  # an absolute name replaces `path`
    if not folder.is_dir():
        if has_weights and name in CLIP_FACTS:
            return _Tower(vision_config(CLIP_FACTS[name], name), None, name)
        if not HUB_ID.fullmatch(name):
            raise CheckpointError(
                f"mm_vision_tower is '{name}': {folder} is not a folder, and it is no hub id. "
                "Expected the CLIP vision tower there. Put it there, or correct config.json."
            )
        folder = download_config(name) if has_weights else download(name)
    values = read_json(folder / "config.json", "a vision tower")
    return _Tower(vision_config(values, name), folder, name)


def _tower_weights(
    tower: _Tower, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, TensorSource]:
    if tower.folder is None:  # llava-hf keeps its tower inside: let the comparison say so
        return tower_tensors({}, path, shapes)
    return tower_tensors(read_tensors(tower.folder), tower.folder, shapes)


def _preprocessor(path: Path, tower: _Tower) -> dict[str, Any]:
    """Return the image processor's settings: the checkpoint's, the tower's, or CLIP's own."""
    for folder in (path, tower.folder):
        if folder is None:
            continue
        if (folder / "preprocessor_config.json").is_file():
            return read_json(folder / "preprocessor_config.json", "a checkpoint")
        if (folder / "processor_config.json").is_file():
            nested = read_json(folder / "processor_config.json", "a checkpoint")
            if isinstance(nested.get("image_processor"), dict):
                return nested["image_processor"]
    size = tower.config.image_size
    logger.info("%s has no preprocessor_config.json: using CLIP's, at %d pixels", path, size)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(_IMAGE_MEAN),
        "image_std": list(_IMAGE_STD),
    }
