"""Write a figure so that its file appears under its name only when it is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot_format", "save_plot"]

_FORMATS = ("png", "svg", "pdf")


def check_plot_format(path: str | os.PathLike[str]) -> str:
    """Return the format that a file's suffix stands for.

    Raises:
        ValueError: If there is no such format.
    """
    suffix = Path(path).suffix
    if suffix[1:].lower() not in _FORMATS:
        raise ValueError(
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
        ValueError: If the suffix is another.
    """
    path = Path(path)
    file_format = check_plot_format(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format=file_format)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
