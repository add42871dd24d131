"""Write texts and figures so that a file appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.errors import InvalidInputError, SettingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["check_plot_format", "save_plot", "write_text"]

_FORMATS = ("png", "svg", "pdf")


def check_plot_format(path: str | os.PathLike[str]) -> str:
    """Return the format that a file's suffix stands for.

    Raises:
        SettingError: If there is no such format.
    """
    suffix = Path(path).suffix
    if suffix[1:].lower() not in _FORMATS:
        raise SettingError(
            f"Plot {path} has suffix {suffix!r}, expected one of "
            f"{', '.join('.' + name for name in _FORMATS)}. Change the file name."
        )
    return suffix[1:].lower()


def save_plot(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure; an old file of that name stays as it is until then.

    Args:
        figure: What to write.
        path: Where to; the suffix .png, .svg or .pdf gives the format.

    Raises:
        SettingError: If the suffix is another.
        InvalidInputError: If the file cannot be written.
    """
    file_format = check_plot_format(path)
    with _replaced_when_complete(Path(path)) as partial:
        figure.savefig(partial, format=file_format)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8; an old file of that name stays as it is until then.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    with _replaced_when_complete(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _replaced_when_complete(path: Path) -> Iterator[Path]:
    """Give a name to write to, which takes the place of `path` at the end."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be written ({error.strerror or error}). Choose a file you may write."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
