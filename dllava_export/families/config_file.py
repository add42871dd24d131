"""Read JSON configuration files and transformers' configurations, with errors that help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllava_export.errors import CheckpointError

__all__ = ["read_json"]


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
