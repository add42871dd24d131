"""Read JSON configuration files and transformers' configurations, with errors that help."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dllava_export.errors import CheckpointError, DllavaExportError

__all__ = ["check_sizes", "quiet_transformers", "read_json", "transformers_config"]

Config = TypeVar("Config")


def read_json(
    path: Path, what: str, error_type: type[DllavaExportError] = CheckpointError
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        what: What its folder would be if all was well, for the message: `a checkpoint`.
        error_type: What to raise.

    Raises:
        DllavaExportError: Of `error_type`, if the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise error_type(
            f"{path.parent} is not {what}: it has no {path.name}. "
            "Name the folder that holds it, or restore the file."
        ) from error
    except (OSError, ValueError) as error:
        raise error_type(
            f"{path.parent} is not {what}: {path.name} cannot be read as JSON ({error}). "
            "Restore the file."
        ) from error
    if not isinstance(value, dict):
        raise error_type(
            f"{path.parent} is not {what}: {path.name} holds a JSON {type(value).__name__}, "
            "expected an object. Restore the file."
        )
    return value


def transformers_config(cls: type[Config], name: str, values: Mapping[str, Any]) -> Config:
    """Return a configuration of transformers.

    Args:
        cls: Its class.
        name: What it is, for the message: `text configuration`.
        values: Arguments of the class.

    Raises:
        CheckpointError: If the class refuses the values.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_transformers():
            return cls(**values)
    except (StrictDataclassError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The {name} of config.json cannot be read: {reason}. Restore config.json."
        ) from error


def check_sizes(name: str, config: object, keys: tuple[str, ...]) -> None:
    """Check that attributes of a configuration are whole numbers of at least 1.

    Args:
        name: What it is, the start of a sentence: `The text configuration`.
        config: The configuration.
        keys: Names of the attributes.

    Raises:
        CheckpointError: If one is not.
    """
    for key in keys:
        value = getattr(config, key)
        if not (type(value) is int and value >= 1):
            raise CheckpointError(
                f"{name} has {key} {value!r}, expected a whole number of at least 1. "
                "Restore config.json."
            )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from warning: what matters is an error or a warning of ours."""
    advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # asked when transformers is imported
    before = os.environ.get(advice)
    os.environ[advice] = "1"
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if before is None:
            del os.environ[advice]
        else:
            os.environ[advice] = before
