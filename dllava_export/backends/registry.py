"""The backends there are: the only list of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from dllava_export.backends.factory import BackendFactory
from dllava_export.errors import BackendError
from dllava_export.registries import Registry, close_match

__all__ = ["BACKENDS", "DEFAULT_BACKEND", "backend_options"]

BACKENDS: Registry[BackendFactory] = Registry(
    "backend",
    "dllava_export.backends",
    {
        "onnxruntime": "dllava_export.backends.ort.factory:OrtFactory",
        "tensorrt-rtx": "dllava_export.backends.trt.factory:TensorRTRTXFactory",
        "tensorrt": "dllava_export.backends.trt.factory:TensorRTFactory",
    },
    contract=BackendFactory,  # type: ignore[type-abstract]  # nothing makes one of it
    texts=("name", "summary"),
    unknown=lambda message: BackendError(
        f"{message} `dllava-export doctor` tells what each one needs."
    ),
)

DEFAULT_BACKEND = "onnxruntime"
"""Runs on any machine, and needs nothing built."""


def backend_options(factory: BackendFactory, values: dict[str, Any]) -> Any:
    """Return a backend's own options, from those that were given.

    Raises:
        BackendError: If an option belongs to another backend, or to none.
    """
    known = tuple(field.name for field in dataclasses.fields(factory.options))
    for name, value in values.items():
        if name in known:
            continue
        owners = [
            other.name
            for other in BACKENDS.usable()
            if name in (field.name for field in dataclasses.fields(other.options))
        ]
        if owners:
            raise BackendError(
                f"{name} {value!r} was given with backend {factory.name!r}, which has none; it "
                f"belongs to {' and '.join(owners)}. Leave it out."
            )
        raise BackendError(
            f"Backend {factory.name!r} has no option {name!r}; it has "
            f"{', '.join(known) or 'none'}. {close_match(name, known)}".rstrip()
        )
    return factory.options(**values)
