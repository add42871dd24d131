"""Read JSON configuration files and transformers' configurations, with errors that help.

What a file may hold is a table: path of a key → what its value may be. A key that is absent or
null is never refused here; whoever needs it says so.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dllava_export.errors import CheckpointError, DllavaExportError
from dllava_export.families.config_kinds import (
    FLAG,
    LIST,
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    TEXTS,
    WHOLE,
    WHOLES,
    Kinds,
)
from dllava_export.json_text import parse_json

__all__ = [
    "LFS_POINTER",
    "LFS_REMEDY",
    "MAX_VOCAB_SIZE",
    "check_kinds",
    "check_sizes",
    "quiet_transformers",
    "read_json",
    "transformers_config",
]

Config = TypeVar("Config")

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for a larger one in a git repository."""

LFS_REMEDY = "it is a git-lfs pointer, not the file: run `git lfs pull` in its folder"

MAX_VOCAB_SIZE = 1 << 24
"""Token ids are below it."""

_MAX_FILE_BYTES = 64 << 20
_MAX_SHOWN = 60
_MAX_SIZE = 1 << 20
_MAX_SIZES: Mapping[str, int] = {
    "image_size": 1 << 14,
    "max_position_embeddings": 1 << 31,
    "num_hidden_layers": 1 << 10,
    "vocab_size": MAX_VOCAB_SIZE,
}


def read_json(
    path: Path,
    what: str,
    error_type: type[DllavaExportError] = CheckpointError,
    *,
    kinds: Kinds | None = None,
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file, of at most 64 MiB.
        what: What its folder would be if all was well, for the message: `a checkpoint`.
        error_type: What to raise.
        kinds: What values may be, as for `check_kinds`.

    Raises:
        DllavaExportError: Of `error_type`, if the file is missing or is not a JSON object, or
            a value is of another kind.
    """
    try:
        value = parse_json(_content(path))
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
    check_kinds(value, kinds or {}, str(path), error_type)
    return value


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("it is a folder or a device, expected a file")
    size = path.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise ValueError(f"it has {size} bytes, expected at most {_MAX_FILE_BYTES}")
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise ValueError(LFS_REMEDY)
    return content


def check_kinds(
    values: Mapping[str, Any],
    kinds: Kinds,
    where: str,
    error_type: type[DllavaExportError] = CheckpointError,
    *,
    required: bool = False,
    remedy: str = "Restore the file.",
) -> None:
    """Check that values of a configuration are of the kinds they may have.

    Args:
        values: The configuration.
        kinds: Path of a key (`text_config.hidden_size`, `*` for any key) → the kinds its value
            may have, of those in `config_kinds`.
        where: The file, for the message.
        error_type: What to raise.
        required: Refuse what is absent or null as well.
        remedy: What to do, for the message.

    Raises:
        DllavaExportError: Of `error_type`, if a value is not of one of its kinds. The message
            has the file, the path of the key and the value.
    """
    for pattern, allowed in kinds.items():
        for path, value in _values_at(values, pattern.split("."), ""):
            if value is None and not required:
                continue
            if value is not None and any(_is_of_kind(value, kind) for kind in allowed):
                continue
            shown = "absent" if value is None else repr(value)
            shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
            raise error_type(
                f"{where}: {path} is {shown}, expected {' or '.join(allowed)}. {remedy}"
            )


def _values_at(value: Any, keys: Sequence[str], path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, value); None for what is absent."""
    if not keys:
        yield path.removeprefix("."), value
        return
    first, *others = keys
    found = value if isinstance(value, Mapping) else {}
    for key in found if first == "*" else (first,):
        yield from _values_at(found.get(key), others, f"{path}.{key}")


def _is_of_kind(value: object, kind: str) -> bool:
    """Return whether a JSON value is of a kind; whole numbers fit 64 bits."""
    if kind in (WHOLE, NUMBER):
        is_whole = type(value) is int and -(1 << 63) <= value < 1 << 63
        return is_whole or (kind == NUMBER and type(value) is float and math.isfinite(value))
    items = {TEXTS: TEXT, NUMBERS: NUMBER, WHOLES: WHOLE}.get(kind)
    if items is not None:
        return isinstance(value, list) and all(_is_of_kind(item, items) for item in value)
    types = {TEXT: str, FLAG: bool, OBJECT: Mapping, LIST: list}
    return isinstance(value, types[kind])


def transformers_config(cls: type[Config], name: str, values: Mapping[str, Any]) -> Config:
    """Return a configuration of transformers.

    Args:
        cls: Its class.
        name: What it is, for the message: `text configuration`.
        values: Arguments of the class.

    Raises:
        CheckpointError: If the class refuses the values.
    """
    try:
        with quiet_transformers():
            return cls(**values)
    # What a class of transformers raises for values it cannot use differs with its version.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The {name} of config.json cannot be read: {reason}. Restore config.json."
        ) from error


def check_sizes(name: str, config: object, keys: tuple[str, ...]) -> None:
    """Check that attributes of a configuration are whole numbers from 1 to a limit.

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
        limit = _MAX_SIZES.get(key, _MAX_SIZE)
        if value > limit:
            raise CheckpointError(
                f"{name} has {key} {value}, expected at most {limit}. Restore config.json."
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
