"""Packages that need not be there: which are, and which extra brings those that are wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dllava_export.errors import MissingPackageError

__all__ = ["EXTRAS", "installed_version", "missing_packages_explained"]

EXTRAS = {"export": ("onnxscript", "polygraphy", "torch"), "train": ("torch",)}
"""Extra of this package → modules that it brings and a plain installation lacks."""


@contextlib.contextmanager
def missing_packages_explained(what: str, extra: str = "export") -> Iterator[None]:
    """Say how to install a package that the block imports in vain.

    Args:
        what: What needs it, for the message: `export`.
        extra: The extra that brings all it needs.

    Raises:
        MissingPackageError: In place of a `ModuleNotFoundError` for one of `EXTRAS`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS[extra]:
            raise
        raise MissingPackageError(
            f"{what} needs {module}, which is not installed. Install it: "
            f'pip install "dllava-export[{extra}]"'
        ) from error


def installed_version(*distributions: str) -> str | None:
    """Return the version of the first distribution that is installed, or None."""
    from importlib.metadata import PackageNotFoundError, version  # takes its time to import

    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
