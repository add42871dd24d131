"""Read a checkpoint: which model it is, and where each of its tensors lies.

Only configuration files and the headers of the weight files are read; see `TensorSource.read`
for values. What a configuration means, the checkpoint's family knows.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dllava_export import names
from dllava_export.checkpoints.canonical import (
    canonical_tensors,
    checked_tensors,
    expected_shapes,
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
from dllava_export.families.config_file import check_kinds, read_json
from dllava_export.families.config_kinds import CONFIG_KINDS, PREPROCESSOR_KINDS, below
from dllava_export.families.family import Family, Layout, ModelSpec, OutsideTower
from dllava_export.families.registry import detect_family
from dllava_export.precision import (
    BF16,
    FP16,
    FP32,
    NUMBER_FORMATS,
    NumberFormat,
    format_of_dtype,
)

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
    """A checkpoint, its tensors not loaded.

    Attributes:
        path: Its folder.
        config: Its `config.json`.
        family: The family it belongs to.
        spec: What the family read off its configuration, the decoder cut to the layers asked
            for.
        tensors: Canonical name → tensor; see `families.family`.
        weight_format: Of the decoder's weights; where they differ, the one that holds all.
        tokenizer_files: Tokenizer files in the folder.
        preprocessor: Image processor settings, as in `preprocessor_config.json`.
    """

    path: Path
    config: dict[str, Any] = dataclasses.field(repr=False)
    family: Family
    spec: ModelSpec
    tensors: dict[str, TensorSource] = dataclasses.field(repr=False)
    weight_format: NumberFormat
    tokenizer_files: tuple[Path, ...]
    preprocessor: dict[str, Any] = dataclasses.field(repr=False)

    @property
    def has_predictors(self) -> bool:
        """True where there is at least an image predictor."""
        return self.spec.predictors is not None and self.spec.predictors.use_vision_predictor

    @property
    def has_tokenizer(self) -> bool:
        """True where the folder holds a tokenizer."""
        found = {path.name for path in self.tokenizer_files}
        return bool(found & {"tokenizer.json", "tokenizer.model"})


@dataclasses.dataclass(frozen=True)
class _Tower:
    """A vision tower that may lie outside the checkpoint.

    Attributes:
        place: What the family says of it.
        config: Its configuration.
        folder: Its folder; None where nothing was looked for outside.
        is_inside: True where the checkpoint holds its weights.
    """

    place: OutsideTower
    config: Mapping[str, Any]
    folder: Path | None
    is_inside: bool


@dataclasses.dataclass(frozen=True)
class _Described:
    """What the configuration files say; attributes as in `Checkpoint`, if not there yet."""

    path: Path
    config: dict[str, Any]
    family: Family
    spec: ModelSpec
    tower: _Tower | None
    preprocessor: dict[str, Any] | None


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
        SettingError: If `num_decoder_layers` is not in 1..num_hidden_layers.
    """
    path = resolve_folder(location)
    config = read_json(path / "config.json", "a checkpoint", kinds=CONFIG_KINDS)
    family, layout = detect_family(config)
    check_kinds(config, family.config_kinds, str(path / "config.json"))
    stored = read_tensors(path)
    described = _describe(path, config, family, layout, stored, num_decoder_layers)
    spec, tower = described.spec, described.tower
    _check_number_of_layers(path, spec, len(stored))
    renames = family.renames(config, layout, stored)
    inside = expected_shapes(spec)
    if tower is None or tower.is_inside:
        return _checkpoint(described, canonical_tensors(stored, path, renames, spec, inside))
    outside = {
        name: inside.pop(name)
        for name in list(inside)
        if renames.stored(name).startswith(tower.place.stored_prefix)
    }
    tensors = canonical_tensors(stored, path, renames, spec, inside)
    assert tower.folder is not None  # `_find_tower` looked for weights
    weights = read_tensors(tower.folder)
    tensors |= checked_tensors(weights, tower.folder, tower.place.renames, outside)
    return _checkpoint(described, tensors)


def _check_number_of_layers(path: Path, spec: ModelSpec, num_tensors: int) -> None:
    """Refuse more layers than tensors, before every layer's tensors are listed."""
    if spec.num_stored_layers > num_tensors:
        raise CheckpointError(
            f"config.json of {path} has num_hidden_layers {spec.num_stored_layers}, its weight "
            f"files hold {num_tensors} tensors, expected several for each layer. "
            "Use the config.json that was saved with these weights, or restore them."
        )


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
        SettingError: If `num_decoder_layers` is not in 1..num_hidden_layers.
    """
    file = Path(config_json)
    config = read_json(file, "a folder with a configuration", kinds=CONFIG_KINDS)
    family, layout = detect_family(config, bare_decoder=True)
    check_kinds(config, family.config_kinds, str(file))
    described = _describe(file.parent, config, family, layout, None, num_decoder_layers)
    dtype = _config_dtype(config)
    tensors: dict[str, TensorSource] = {
        name: RandomSource(name, DTYPE_NAMES[dtype], shape, None, seed)
        for name, shape in expected_shapes(described.spec).items()
    }
    if described.spec.ties_embeddings:
        tensors[names.LM_HEAD] = tensors[names.TOKEN_EMBEDDING]
    return _checkpoint(described, tensors)


def _config_dtype(config: Mapping[str, Any]) -> str:
    name = config.get("torch_dtype") or config.get("dtype") or "float32"
    known = format_of_dtype(name)
    if known is None:
        expected = ", ".join(f.dtype_name for f in NUMBER_FORMATS.values())
        raise CheckpointError(
            f"torch_dtype is {name!r}, expected one of {expected}. Change it in config.json."
        )
    return known.stored_name


def _describe(
    path: Path,
    config: dict[str, Any],
    family: Family,
    layout: Layout,
    keys: Iterable[str] | None,
    num_decoder_layers: int | None,
) -> _Described:
    """Read the other configuration files and let the family say what they mean.

    Args:
        path: The checkpoint's folder.
        config: Its `config.json`.
        family: From `detect_family`.
        layout: Likewise.
        keys: Of the tensors in its files; None where weights are not read from files.
        num_decoder_layers: As of `read_checkpoint`.
    """
    place = family.outside_tower(config, layout)
    tower = None if place is None else _find_tower(place, path, keys)
    preprocessor = _read_preprocessor(path, tower)
    spec = family.describe(
        config,
        layout,
        tower=None if tower is None else tower.config,
        preprocessor=preprocessor,
        num_decoder_layers=num_decoder_layers,
    )
    return _Described(path, config, family, spec, tower, preprocessor)


def _checkpoint(described: _Described, tensors: dict[str, TensorSource]) -> Checkpoint:
    path, spec, preprocessor = described.path, described.spec, described.preprocessor
    if preprocessor is None:
        logger.info("%s has no preprocessor_config.json: using the family's", path)
        preprocessor = spec.preprocessor()
    logger.info(
        "%s: %s, %d decoder layers of %d, %d tensors, %.1f GiB",
        path,
        spec.layout,
        spec.num_layers,
        spec.num_stored_layers,
        len(tensors),
        math.fsum(source.num_bytes for source in tensors.values()) / 2**30,
    )
    return Checkpoint(
        path=path,
        config=described.config,
        family=described.family,
        spec=spec,
        tensors=tensors,
        weight_format=_weight_format(tensors),
        tokenizer_files=tuple(
            path / name for name in _TOKENIZER_FILES if (path / name).is_file()
        ),
        preprocessor=preprocessor,
    )


def _weight_format(tensors: Mapping[str, TensorSource]) -> NumberFormat:
    decoder = {
        source.dtype
        for name, source in tensors.items()
        if name.startswith(("model.", "lm_head."))
    }
    return next((known for known in (FP16, BF16) if decoder == {known.numpy}), FP32)


def _find_tower(place: OutsideTower, path: Path, keys: Iterable[str] | None) -> _Tower:
    """Find a tower's configuration, and its folder where there is one.

    Args:
        place: What the family says of it.
        path: The checkpoint's folder.
        keys: Of the tensors in the checkpoint; None where no weights are needed.
    """
    is_inside = keys is None or any(key.startswith(place.stored_prefix) for key in keys)
    if is_inside and place.config:
        return _Tower(place, place.config, None, is_inside)
    key, name = place.config_key, place.name
    if not name:
        raise CheckpointError(
            f"config.json of {path} has no {key}, expected the folder or hub id of its vision "
            "tower. Add it."
        )
    folder = path / name  # an absolute name replaces `path`
    if not folder.is_dir():
        if not HUB_ID.fullmatch(name):
            raise CheckpointError(
                f"{key} is '{name}': {folder} is not a folder, and it is no hub id. "
                "Expected the vision tower there. Put it there, or correct config.json."
            )
        folder = download_config(name) if is_inside else download(name)
    config = read_json(folder / "config.json", "a vision tower", kinds=CONFIG_KINDS)
    return _Tower(place, config, folder, is_inside)


def _read_preprocessor(path: Path, tower: _Tower | None) -> dict[str, Any] | None:
    """Return the image processor's settings: the checkpoint's or the tower's, if any."""
    for folder in (path, None if tower is None else tower.folder):
        if folder is None:
            continue
        if (folder / "preprocessor_config.json").is_file():
            file = folder / "preprocessor_config.json"
            return read_json(file, "a checkpoint", kinds=PREPROCESSOR_KINDS)
        if (folder / "processor_config.json").is_file():
            kinds = below("image_processor", PREPROCESSOR_KINDS)
            nested = read_json(folder / "processor_config.json", "a checkpoint", kinds=kinds)
            if nested.get("image_processor") is not None:
                return nested["image_processor"]
    return None
