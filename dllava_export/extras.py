"""Packages that only some commands need: which extra brings them, said in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dllava_export.errors import MissingPackageError

__all__ = ["EXTRAS", "missing_packages_explained"]

EXTRAS = {"torch": "export", "onnxscript": "export", "polygraphy": "export"}
"""Module → the extra of this package that installs it."""


@contextlib.contextmanager
def missing_packages_explained(what: str) -> Iterator[None]:
    """Say how to install a package that the block imports in vain.

    Args:
        what: What needs it, for the message: `export`.

    Raises:
        MissingPackageError: In place of a `ModuleNotFoundError` for one of `EXTRAS`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        raise MissingPackageError(
            f"{what} needs {module}, which is not installed. Install it: "
            f'pip install "dllava-export[{EXTRAS[module]}]"'
        ) from error
