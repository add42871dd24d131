"""Write texts and figures so that a file appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.errors import BundleError, InvalidInputError, SettingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = [
    "check_plot_format",
    "new_folder",
    "replaced_folder",
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
        partial.replace(path)
    except OSError as error:
        if failure is not None:
            raise failure(error) from error
        raise InvalidInputError(
            f"{path} cannot be written ({error.strerror or error}). Choose a file you may write."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` if the block ends well, and vanishes if not.

    Raises:
        BundleError: If `out` exists and is not an empty folder, or cannot be written.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "is a folder with files in it" if out.is_dir() else "is a file"
        raise BundleError(
            f"{out} {kind}; expected a new or empty folder. Choose another name or remove it."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise BundleError(
            f"{out.parent} cannot be written ({error.strerror}). Choose a folder you may write."
        ) from error
    try:
        partial.chmod(0o755)  # mkdtemp makes it private
        yield partial
        partial.rename(out)
    except OSError as error:
        raise BundleError(
            f"Writing {out} failed: {error.strerror or error}. Free some space or choose "
            "another disk; nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def replaced_folder(target: Path, advice: str) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `target` if the block ends well.

    Args:
        target: The folder; an old one is removed when the new one is in its place.
        advice: What to do where it cannot be written, for the message.

    Raises:
        BundleError: If it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise BundleError(
            f"{target.parent} cannot be written ({error.strerror}). {advice}"
        ) from error
    old = partial.with_name(partial.name.replace("partial", "old"))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise BundleError(
            f"Writing {target} failed: {error.strerror or error}. Free some space; what was "
            "there before is still there."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
