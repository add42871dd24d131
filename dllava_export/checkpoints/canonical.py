"""Which tensors a checkpoint must hold, and under which names; see `families.family`.

    key in a file ─ the family's renames ─► canonical name ─ shapes of its modules ─► compared

Nothing here knows a model: names and shapes are those of the modules that will be traced.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from dllava_export import names
from dllava_export.checkpoints.tensor_source import TensorSource
from dllava_export.errors import CheckpointError
from dllava_export.families.family import ModelSpec, Renames

__all__ = ["canonical_tensors", "checked_tensors", "expected_shapes"]

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

_MAX_LISTED = 5
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SWITCHED_OFF = ("image_predictor.", "output_text_predictor.", "instruct_predictor.")


def expected_shapes(spec: ModelSpec) -> Shapes:
    """Return canonical name → shape of all tensors of a model.

    The modules themselves are asked, without memory for values.
    """
    import torch

    from dllava_export.families.predictors import Predictors

    shapes = spec.decoder().shapes() | spec.visual().shapes()
    if spec.predictors is not None:
        hidden_size = shapes[names.TOKEN_EMBEDDING][1]
        with torch.device("meta"):
            state = Predictors(hidden_size, spec.predictors).state_dict()
        shapes |= {name: tuple(tensor.shape) for name, tensor in state.items()}
    return shapes


def canonical_tensors(
    tensors: Mapping[str, TensorSource],
    where: Path,
    renames: Renames,
    spec: ModelSpec,
    expected: Mapping[str, Shape],
) -> dict[str, TensorSource]:
    """Return a checkpoint's tensors by canonical name, all present and of the right shape.

    Args:
        tensors: Every tensor of the checkpoint's files, by the key it is stored under.
        where: The checkpoint's folder, for messages.
        renames: How the checkpoint spells canonical names.
        spec: What the configuration says.
        expected: What the files must hold, from `expected_shapes`.

    Raises:
        CheckpointError: If tensors are missing, unknown, or of another shape.
    """
    found, unknown = _renamed(tensors, where, renames)
    if spec.ties_embeddings and names.TOKEN_EMBEDDING in found:
        found.setdefault(names.LM_HEAD, found[names.TOKEN_EMBEDDING])
    surplus = [
        source
        for name, source in found.items()
        if name not in expected and not _may_be_left_out(name, spec)
    ]
    return _compared(found, unknown + surplus, where, renames, expected)


def checked_tensors(
    tensors: Mapping[str, TensorSource],
    where: Path,
    renames: Renames,
    expected: Mapping[str, Shape],
) -> dict[str, TensorSource]:
    """Return the tensors of a part that has a folder of its own, such as a vision tower.

    Arguments and errors are those of `canonical_tensors`.
    """
    found, unknown = _renamed(tensors, where, renames)
    surplus = [source for name, source in found.items() if name not in expected]
    return _compared(found, unknown + surplus, where, renames, expected)


def _renamed(
    tensors: Mapping[str, TensorSource], where: Path, renames: Renames
) -> tuple[dict[str, TensorSource], list[TensorSource]]:
    """Return tensors by canonical name, and those that have none."""
    renamed: dict[str, TensorSource] = {}
    unknown = []
    for key, source in tensors.items():
        if renames.is_ignored(key):
            continue
        name = renames.canonical(key)
        if name is None:
            unknown.append(source)
        elif name in renamed:
            raise CheckpointError(
                f"{where} holds '{name}' twice, as '{renamed[name].name}' and as '{key}', "
                "expected one. Remove one of them."
            )
        else:
            renamed[name] = source
    return renamed, unknown


def _compared(
    found: Mapping[str, TensorSource],
    unknown: list[TensorSource],
    where: Path,
    renames: Renames,
    expected: Mapping[str, Shape],
) -> dict[str, TensorSource]:
    """Return the tensors that are expected, in that order; raise one error for all faults."""
    comparison = _Comparison(where)
    for surplus in unknown:
        comparison.add_unknown(surplus)
    result = {}
    for name, shape in expected.items():
        source = found.get(name)
        if source is None:
            comparison.missing.append(f"'{renames.stored(name)}' {list(shape)}")
        elif source.shape != shape:
            comparison.add_wrong(source, shape)
        else:
            result[name] = source
    comparison.raise_if_any()
    return result


def _may_be_left_out(name: str, spec: ModelSpec) -> bool:
    """Return whether a tensor that the configuration does not ask for is no surprise."""
    layer = _LAYER.match(name)
    if layer:  # layers beyond num_decoder_layers
        return spec.num_layers <= int(layer[1]) < spec.num_stored_layers
    # A predictor that sparse_config switches off, as upstream's benchmarks do.
    uses = spec.predictors
    if uses is None or not name.startswith(_SWITCHED_OFF):
        return False
    if name.startswith("image_predictor."):
        return not uses.use_vision_predictor
    return name.startswith("instruct_predictor.") or not uses.has_output_text


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


def _listed(items: list[str]) -> str:
    more = f"; and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return "; ".join(items[:_MAX_LISTED]) + more


def _count(items: list[str], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"
