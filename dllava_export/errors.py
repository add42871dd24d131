"""Errors that a caller may want to catch apart. Messages say: found, expected, what to do."""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "DllavaExportError",
    "EngineBuildError",
    "InvalidInputError",
    "MissingPackageError",
    "PostconditionError",
    "PreconditionError",
    "RegistryError",
    "SettingError",
    "UnexpectedError",
    "UnsupportedModelError",
]


class DllavaExportError(Exception):
    """Base of every error this package raises on purpose."""


class SettingError(DllavaExportError, ValueError):
    """A setting is out of range, unknown, or does not go with another one."""


class MissingPackageError(DllavaExportError):
    """A package is not installed that a plain installation leaves out."""


class RegistryError(DllavaExportError):
    """Something that another package adds cannot be loaded, or has a name that is taken."""


class CheckpointError(DllavaExportError):
    """A checkpoint cannot be read: missing or truncated files, missing or unknown keys."""


class UnsupportedModelError(DllavaExportError):
    """The checkpoint or graph is readable, but of a kind this toolkit does not handle."""


class UnexpectedError(DllavaExportError):
    """What nobody thought of: a defect, or a machine without memory; its cause is the error."""


class PreconditionError(DllavaExportError):
    """A graph pass met a graph that lacks what the pass requires."""


class PostconditionError(DllavaExportError):
    """A graph pass did not produce what it promises: a defect of the pass."""


class BundleError(DllavaExportError):
    """A bundle is missing, incomplete, changed, or of another schema version."""


class InvalidInputError(DllavaExportError):
    """A request does not fit the model: prompt, image or token ids."""


class CapacityError(DllavaExportError):
    """A request needs more KV cache rows than were planned."""


class BackendError(DllavaExportError):
    """A backend is unknown, not installed, or cannot run this bundle."""


class EngineBuildError(BackendError):
    """TensorRT refuses a graph or cannot build an engine from it."""
