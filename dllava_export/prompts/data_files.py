"""Files of questions and conversations: read as text, their pictures inside one folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dllava_export.errors import DllavaExportError

__all__ = ["OutsideError", "answer_text", "image_file", "read_data_file"]


class OutsideError(DllavaExportError):
    """A picture lies outside the folder that pictures are in."""


def read_data_file(path: Path) -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    Raises:
        OSError: If it cannot be read, or is a pipe or device, which may have no end.
        ValueError: If it is not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    return path.read_text(encoding="utf-8-sig")


def answer_text(value: Any) -> Any:
    """Return an answer as text where it is a number; anything else as it is."""
    is_number = type(value) is int or (type(value) is float and math.isfinite(value))
    return str(value) if is_number else value


def image_file(folder: Path, name: str, *, allow_outside: bool = False) -> Path | None:
    """Return the file of a picture that a record names; None where there is none.

    Args:
        folder: What names start from.
        name: The name in the record.
        allow_outside: Take absolute names, `..`, and links that lead out of the folder.

    Raises:
        OutsideError: If the file is not in the folder, and need be.
    """
    file = folder / name
    try:
        resolved = file.resolve()
        if not allow_outside and not resolved.is_relative_to(folder.resolve()):
            raise OutsideError(
                f"the image {name!r} leads to {resolved}, outside {folder}; expected a file in "
                "that folder. Name another with --image-folder, or pass --allow-outside"
            )
        return file if file.is_file() else None
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # too long a name, circles of links, null bytes
        return None
