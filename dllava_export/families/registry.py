"""The families there are: the built-in ones, and those that other packages bring.

Another package names a `Family` subclass, or an instance of one, in the entry point group
`dllava_export.families`; the entry point's name is the family's:

    [options.entry_points]
    dllava_export.families =
        my-vlm = my_package.my_vlm:MyFamily

A family is loaded when it is asked for, or when no family before it takes a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllava_export.errors import UnsupportedModelError
from dllava_export.families.family import Family, Layout
from dllava_export.families.positions import PositionRule, SequentialPositions
from dllava_export.registries import Registry

__all__ = ["FAMILIES", "detect_family", "positions_of"]

FAMILIES: Registry[Family] = Registry(
    "family",
    "dllava_export.families",
    # In the order in which they see a configuration.
    {"llava": "dllava_export.families.llava:LlavaFamily"},
    contract=Family,  # type: ignore[type-abstract]  # nothing makes one of it
    texts=("name", "title"),
    unknown=UnsupportedModelError,
)


def positions_of(family: str | None) -> PositionRule:
    """Return the position rule of a bundle's family; a bare decoder counts rows.

    Raises:
        UnsupportedModelError: If there is no family of that name.
        RegistryError: If it cannot be loaded.
    """
    return SequentialPositions() if family is None else FAMILIES.get(family).positions


def detect_family(
    config: Mapping[str, Any], *, bare_decoder: bool = False
) -> tuple[Family, Layout]:
    """Return the family that a configuration belongs to, and the checkpoint's layout.

    Args:
        config: The parsed `config.json`.
        bare_decoder: Take the configuration of a decoder alone too; for random weights.

    Raises:
        UnsupportedModelError: If no family takes it, or one refuses it, or it is quantised.
        CheckpointError: If something is missing in it.
        RegistryError: If a family cannot be loaded.
    """
    _refuse_quantised(config)
    supported = []
    for family in map(FAMILIES.get, FAMILIES.names()):
        layout = family.detect(config, bare_decoder=bare_decoder)
        if layout is not None:
            return family, layout
        supported.append(f"{family.title} ({', '.join(family.architectures)})")
    raise UnsupportedModelError(
        f"model_type {config.get('model_type')!r} with architectures "
        f"{list(config.get('architectures') or [])} is not supported, expected "
        f"{' or '.join(supported)}. Use such a checkpoint, or install a package that brings "
        f"the family (entry point group {FAMILIES.group})."
    )


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config")
    if not settings:
        return
    method = settings
    if isinstance(settings, Mapping):
        method = settings.get("quant_method", "unknown")
    raise UnsupportedModelError(
        f"The checkpoint has a quantization_config (quant_method {method!r}), expected "
        "float32, float16 or bfloat16 weights. Use the checkpoint it was quantised from."
    )
