"""The families there are: the built-in ones, and those that other packages bring.

Another package names a `Family` subclass, or an instance of one, in the entry point group
`dllava_export.families`; the entry point's name is the family's:

    [options.entry_points]
    dllava_export.families =
        my-vlm = my_package.my_vlm:MyFamily

A family is loaded when it is asked for, or when no family before it takes a configuration.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

from dllava_export.errors import DllavaExportError, UnsupportedModelError
from dllava_export.families.family import Family, Layout
from dllava_export.families.positions import PositionRule, SequentialPositions

__all__ = [
    "ENTRY_POINTS",
    "detect_family",
    "families",
    "family_names",
    "get_family",
    "positions_of",
]

ENTRY_POINTS = "dllava_export.families"
"""The entry point group."""

# Name → class. In the order in which they see a configuration.
_BUILT_IN: Mapping[str, str] = {
    "llava": "dllava_export.families.llava:LlavaFamily",
}


def family_names() -> tuple[str, ...]:
    """Return the names of all families, the built-in ones first.

    Raises:
        DllavaExportError: If two packages bring a family of the same name, or one brings a
            family of a built-in name.
    """
    return (*_BUILT_IN, *_entry_points())


def families() -> Iterator[Family]:
    """Yield all families in the order of `family_names`, each loaded as it is reached.

    Raises:
        DllavaExportError: If names clash, or a family cannot be loaded.
    """
    for name in family_names():
        yield get_family(name)


def get_family(name: str) -> Family:
    """Return a family.

    Raises:
        UnsupportedModelError: If there is none of that name.
        DllavaExportError: If it cannot be loaded.
    """
    if name in _BUILT_IN:  # a runtime need not look for other packages
        return _built_in(name)
    others = _entry_points()
    if name in others:
        return _loaded(others[name])
    known = (*_BUILT_IN, *others)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnsupportedModelError(
        f"Model family {name!r} is unknown, expected one of {', '.join(known)}.{hint} Install "
        f"the package that brings it (entry point group {ENTRY_POINTS}), or a newer "
        "dllava-export."
    )


def positions_of(family: str | None) -> PositionRule:
    """Return the position rule of a bundle's family; a bare decoder counts rows.

    Raises:
        UnsupportedModelError: If there is no family of that name.
        DllavaExportError: If it cannot be loaded.
    """
    return SequentialPositions() if family is None else get_family(family).positions


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
        DllavaExportError: If a family cannot be loaded.
    """
    _refuse_quantised(config)
    supported = []
    for family in families():
        layout = family.detect(config, bare_decoder=bare_decoder)
        if layout is not None:
            return family, layout
        supported.append(f"{family.title} ({', '.join(family.architectures)})")
    raise UnsupportedModelError(
        f"model_type {config.get('model_type')!r} with architectures "
        f"{list(config.get('architectures') or [])} is not supported, expected "
        f"{' or '.join(supported)}. Use such a checkpoint, or install a package that brings "
        f"the family (entry point group {ENTRY_POINTS})."
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


@functools.cache
def _built_in(name: str) -> Family:
    module, _, attribute = _BUILT_IN[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the families of other packages by name, none of them loaded."""
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in _BUILT_IN:
            raise DllavaExportError(
                f"{_origin(entry)} brings a model family {entry.name!r}, which is a built-in "
                "one; expected a name of its own. Rename its entry point, or uninstall it."
            )
        if entry.name in found:
            raise DllavaExportError(
                f"{_origin(found[entry.name])} and {_origin(entry)} both bring a model family "
                f"{entry.name!r}, expected one. Uninstall one of them."
            )
        found[entry.name] = entry
    return found


def _loaded(entry: importlib.metadata.EntryPoint) -> Family:
    try:
        value = entry.load()
        family = value() if isinstance(value, type) else value
    except Exception as error:  # whatever the import of somebody else's module raises
        raise DllavaExportError(
            f"The model family {entry.name!r} of {_origin(entry)} cannot be loaded from "
            f"{entry.value}: {type(error).__name__}: {error}. Expected a subclass or an "
            "instance of dllava_export.families.family.Family. Repair or uninstall the package."
        ) from error
    if not isinstance(family, Family) or getattr(family, "name", None) != entry.name:
        found = f"a family named {getattr(family, 'name', None)!r}"
        if not isinstance(family, Family):
            found = repr(value)
        raise DllavaExportError(
            f"The model family {entry.name!r} of {_origin(entry)} is {found} at {entry.value}, "
            "expected a subclass or an instance of dllava_export.families.family.Family of "
            "that name. Repair or uninstall the package."
        )
    return family


def _origin(entry: importlib.metadata.EntryPoint) -> str:
    return f"package {entry.dist.name} {entry.dist.version}" if entry.dist else "a package"
