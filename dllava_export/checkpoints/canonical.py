"""Which tensors a checkpoint must hold: canonical names, shapes, and each layout's names.

Canonical names are those of transformers' modules, whatever the layout on disk:
`model.*` and `lm_head.weight` for the decoder, `projector.{0, 2, ...}.*`, the parameters of
`CLIPVisionModel` for the tower, `image_predictor.*` and `output_text_predictor.*`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.checkpoints.tensor_source import TensorSource
from dllava_export.errors import CheckpointError
from dllava_export.families.clip_tower import ProjectorConfig
from dllava_export.families.llava import Layout
from dllava_export.families.module_shapes import (
    Shape,
    Shapes,
    _decoder_shapes,
    _predictor_shapes,
    _projector_shapes,
)
from dllava_export.geometry import PredictorConfig

if TYPE_CHECKING:
    from transformers import LlamaConfig


__all__ = ["ModelShapes", "canonical_tensors", "is_tower_key", "tower_tensors"]


_MAX_LISTED = 5

# (prefix in the checkpoint, canonical prefix); the first match wins, in both directions.
# "vision/" marks the tower's parameters until `tower_shapes` tells how they are spelt.
_VISION = "vision/"
_PREFIXES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "original": (
        ("model.vision_tower.vision_tower.vision_model.", _VISION),
        ("model.vision_tower.vision_tower.", _VISION),
        ("model.mm_projector.", "projector."),
        ("model.image_score_predictor.", "image_predictor."),
        ("model.output_text_score_predictor.", "output_text_predictor."),
        ("model.instruct_score_predictor.", "instruct_predictor."),
        ("model.", "model."),
        ("lm_head.", "lm_head."),
    ),
    "llava-hf": (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", _VISION),
        ("vision_tower.", _VISION),
        ("multi_modal_projector.linear_1.", "projector.0."),
        ("multi_modal_projector.linear_2.", "projector.2."),
    ),
    "llava-hf with model prefix": (
        ("model.language_model.", "model."),
        ("lm_head.", "lm_head."),
        ("model.vision_tower.vision_model.", _VISION),
        ("model.vision_tower.", _VISION),
        ("model.multi_modal_projector.linear_1.", "projector.0."),
        ("model.multi_modal_projector.linear_2.", "projector.2."),
    ),
    "vision tower": (("vision_model.", _VISION), ("", _VISION)),
}
# The rest of a CLIP checkpoint that has a text tower too.
_CLIP_TEXT_KEYS = re.compile(r"(text_model|text_projection|visual_projection)\.|logit_scale$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SWITCHED_OFF = ("image_predictor.", "output_text_predictor.", "instruct_predictor.")


@dataclasses.dataclass(frozen=True)
class ModelShapes:
    """Configurations that together say which tensors there are.

    Attributes:
        text: The decoder, already cut to the layers wanted.
        projector: The projector.
        predictors: The predictors, or None.
        num_stored_layers: Decoder layers in the checkpoint, before the cut.
    """

    text: LlamaConfig
    projector: ProjectorConfig
    predictors: PredictorConfig | None
    num_stored_layers: int

    def shapes(self) -> Shapes:
        """Return canonical name → shape of all tensors but the vision tower's."""
        result = _decoder_shapes(self.text)
        result |= _projector_shapes(self.projector)
        if self.predictors is not None:
            result |= _predictor_shapes(self.predictors, self.text.hidden_size)
        return result


def is_tower_key(key: str, layout: Layout) -> bool:
    """Return whether a key of the checkpoint belongs to the vision tower."""
    return _canonical_key(key, _prefixes([key], layout)).startswith(_VISION)


def _prefixes(keys: Iterable[str], layout: Layout) -> tuple[tuple[str, str], ...]:
    if layout != "llava-hf":
        return _PREFIXES["original"]
    has_model = any(key.startswith("model.") for key in keys)
    return _PREFIXES["llava-hf with model prefix" if has_model else "llava-hf"]


def _canonical_key(key: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """Return the canonical name of `key`, or an empty string where it has none."""
    if re.fullmatch(r"model\.mm_projector\.(weight|bias)", key):  # mm_projector_type linear
        return "projector.0." + key.rpartition(".")[2]
    for stored, canonical in prefixes:
        if key.startswith(stored):
            return canonical + key.removeprefix(stored)
    return ""


def _stored_key(name: str, prefixes: tuple[tuple[str, str], ...], is_linear: bool) -> str:
    """Return how the checkpoint would spell the canonical `name`; for messages."""
    if is_linear and name.startswith("projector.0.") and prefixes is _PREFIXES["original"]:
        return "model.mm_projector." + name.rpartition(".")[2]
    for stored, canonical in prefixes:
        if name.startswith(canonical):
            return stored + name.removeprefix(canonical)
    return name


def _rename(
    tensors: Mapping[str, TensorSource], prefixes: tuple[tuple[str, str], ...], where: Path
) -> tuple[dict[str, TensorSource], list[str]]:
    """Return tensors by canonical name, and the keys that have none."""
    renamed: dict[str, TensorSource] = {}
    unknown = []
    for key, source in tensors.items():
        name = _canonical_key(key, prefixes)
        if not name:
            unknown.append(key)
        elif name in renamed:
            raise CheckpointError(
                f"{where} holds '{name}' twice, as '{renamed[name].name}' and as '{key}', "
                "expected one. Remove one of them."
            )
        else:
            renamed[name] = source
    return renamed, unknown


def _listed(items: list[str]) -> str:
    more = f"; and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return "; ".join(items[:_MAX_LISTED]) + more


def _count(items: list[str], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


@dataclasses.dataclass
class _Comparison:
    """What is wrong with a set of tensors, for one message."""

    where: Path
    missing: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def add_unknown(self, source: TensorSource) -> None:
        self.unknown.append(
            f"'{source.name}' {list(source.shape)} in {self._file_name(source)}, expected none"
        )

    def add_wrong(self, source: TensorSource, shape: Shape) -> None:
        self.wrong.append(
            f"'{source.name}' in {self._file_name(source)} is {list(source.shape)}, "
            f"expected {list(shape)}"
        )

    def _file_name(self, source: TensorSource) -> str:
        return (source.file or self.where).name

    def raise_if_any(self) -> None:
        parts = []
        if self.missing:
            parts.append(f"{_count(self.missing, 'missing tensor')}: {_listed(self.missing)}")
        if self.wrong:
            parts.append(f"{_count(self.wrong, 'wrong shape')}: {_listed(self.wrong)}")
        if self.unknown:
            parts.append(f"{_count(self.unknown, 'unknown tensor')}: {_listed(self.unknown)}")
        if parts:
            raise CheckpointError(
                f"The tensors of {self.where} do not fit its config.json. {'. '.join(parts)}. "
                "Use the config.json that was saved with these weights, or restore them."
            )


def canonical_tensors(
    tensors: Mapping[str, TensorSource],
    where: Path,
    layout: Layout,
    model: ModelShapes,
    tower: Mapping[str, Shape] | None,
) -> dict[str, TensorSource]:
    """Return the checkpoint's tensors by canonical name, all present and of the right shape.

    Args:
        tensors: Every tensor of the checkpoint's files, by the key it is stored under.
        where: The checkpoint's folder, for messages.
        layout: The checkpoint's layout.
        model: Configurations.
        tower: The vision tower's shapes where its weights are inside, from `tower_shapes`.

    Raises:
        CheckpointError: If tensors are missing, unknown, or of another shape.
    """
    prefixes = _prefixes(tensors, layout)
    found, unknown = _rename(tensors, prefixes, where)
    comparison = _Comparison(where)
    for key in unknown:
        comparison.add_unknown(tensors[key])
    expected = model.shapes()
    if tower is not None:
        expected |= {
            _VISION + name.removeprefix("vision_model."): tower[name] for name in tower
        }
    if model.text.tie_word_embeddings and "model.embed_tokens.weight" in found:
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    is_linear = model.projector.num_layers == 1
    result = {}
    for name, shape in expected.items():
        source = found.pop(name, None)
        if source is None:
            stored = _stored_key(name, prefixes, is_linear)
            comparison.missing.append(f"'{stored}' {list(shape)}")
        elif source.shape != shape:
            comparison.add_wrong(source, shape)
        else:
            result[name] = source
    for name, source in found.items():
        if not _may_be_left_out(name, model):
            comparison.add_unknown(source)
    comparison.raise_if_any()
    return _with_tower_names(result, tower or {})


def _may_be_left_out(name: str, model: ModelShapes) -> bool:
    """Return whether a tensor that the configuration does not ask for is no surprise."""
    layer = _LAYER.match(name)
    if layer:  # layers beyond num_decoder_layers
        return model.text.num_hidden_layers <= int(layer[1]) < model.num_stored_layers
    # A predictor that sparse_config switches off, as upstream's benchmarks do.
    uses = model.predictors
    if uses is None or not name.startswith(_SWITCHED_OFF):
        return False
    if name.startswith("image_predictor."):
        return not uses.use_vision_predictor
    return name.startswith("instruct_predictor.") or not uses.has_output_text


def _with_tower_names(
    tensors: Mapping[str, TensorSource], tower: Mapping[str, Shape]
) -> dict[str, TensorSource]:
    """Replace the tower's marked names by those of `CLIPVisionModel`."""
    names = {_VISION + name.removeprefix("vision_model."): name for name in tower}
    return {names.get(name, name): source for name, source in tensors.items()}


def tower_tensors(
    tensors: Mapping[str, TensorSource],
    where: Path,
    tower: Mapping[str, Shape],
) -> dict[str, TensorSource]:
    """Return the tensors of a vision tower that has a folder of its own.

    Keys of a CLIP text tower are left out. Arguments and errors are those of
    `canonical_tensors`.
    """
    vision = {key: tensors[key] for key in tensors if not _CLIP_TEXT_KEYS.match(key)}
    found, _ = _rename(vision, _PREFIXES["vision tower"], where)
    comparison = _Comparison(where)
    result = {}
    for name, shape in tower.items():
        source = found.pop(_VISION + name.removeprefix("vision_model."), None)
        if source is None:
            comparison.missing.append(f"'vision_model.{name}' {list(shape)}")
        elif source.shape != shape:
            comparison.add_wrong(source, shape)
        else:
            result[name] = source
    for source in found.values():
        comparison.add_unknown(source)
    comparison.raise_if_any()
    return result
