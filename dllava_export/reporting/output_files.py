"""Write texts and figures so that a file appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.errors import InvalidInputError, SettingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = [
    "check_plot_format",
    "replaced_when_complete",
    "save_plot",
    "write_text",
]

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
    with replaced_when_complete(Path(path)) as partial:
        figure.savefig(partial, format=file_format)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8; an old file of that name stays as it is until then.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    with replaced_when_complete(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replaced_when_complete(
    path: Path, failure: Callable[[OSError], Exception] | None = None
) -> Iterator[Path]:
    """Give a name to write to, which takes the place of `path` if the block ends well.

    `path` is never written in place: it may be a hard link to something of value.

    Args:
        path: The file.
        failure: Makes the error for one of the operating system; by default an
            `InvalidInputError` that says to choose another file.

    Raises:
        Exception: What `failure` makes.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # a name must not be there before its contents
        partial.replace(path)
    except OSError as error:
        if failure is not None:
            raise failure(error) from error
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Free some space" if is_full else "Choose a file you may write"
        raise InvalidInputError(
            f"{path} cannot be written ({error.strerror or error}). {remedy}."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
