"""Import TensorRT or TensorRT-RTX, and listen to what it says."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from types import ModuleType
from typing import Any

from dllava_export.errors import BackendError

__all__ = [
    "OLDEST_VERSIONS",
    "TENSORRT",
    "TENSORRT_BACKENDS",
    "TENSORRT_RTX",
    "target_compute_capabilities",
    "trt_logger",
    "trt_module",
]

logger = logging.getLogger(__name__)

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
TENSORRT_BACKENDS = (TENSORRT, TENSORRT_RTX)
OLDEST_VERSIONS = {TENSORRT: (10, 15), TENSORRT_RTX: (1, 4)}
"""From here on the parser takes opset 24's TensorScatter, Attention and functions."""

_MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
_EXTRAS = {TENSORRT: "trt", TENSORRT_RTX: "trt-rtx"}
_BINDINGS_ONLY = "tensorrt_bindings"
_NUM_VERSION_PARTS = 2


def trt_module(backend: str) -> ModuleType:
    """Import the Python module of a backend.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`.

    Returns:
        The module `tensorrt` or `tensorrt_rtx`; their interfaces agree in what is used here.

    Raises:
        BackendError: If there is no such backend, or its module is missing, broken or too old.
    """
    if backend not in TENSORRT_BACKENDS:
        raise BackendError(
            f"There is no TensorRT backend {backend!r}; expected "
            f"{' or '.join(TENSORRT_BACKENDS)}."
        )
    name = _MODULES[backend]
    install = f'pip install "dllava-export[{_EXTRAS[backend]}]"'
    try:
        module = importlib.import_module(name)
    # A shared library that is not found shows as ImportError, OSError or FileNotFoundError.
    except (ImportError, OSError) as error:
        hint = ""
        if backend == TENSORRT and importlib.util.find_spec(_BINDINGS_ONLY):
            hint = " Only its Python bindings are there, without builder and parser."
        raise BackendError(
            f"The Python module {name} cannot be imported ({error}).{hint} Install it: {install}"
        ) from error
    _check_version(backend, module, install)
    return module


def _check_version(backend: str, module: ModuleType, install: str) -> None:
    found = str(getattr(module, "__version__", "unknown"))
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:_NUM_VERSION_PARTS])
    oldest = OLDEST_VERSIONS[backend]
    if numbers < oldest:
        expected = ".".join(str(part) for part in oldest)
        raise BackendError(
            f"{backend} has version {found}, expected {expected} or later: earlier parsers "
            f"lack ops of opset 24. Update it: {install} --upgrade"
        )


def target_compute_capabilities(trt: ModuleType) -> tuple[str, ...]:
    """Return what TensorRT-RTX can build for, for example `("7.5", "8.0")`."""
    members = (str(name) for name in trt.ComputeCapability.__members__)
    numbers = (name.removeprefix("SM") for name in members if re.fullmatch(r"SM\d+", name))
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers)


def trt_logger(trt: ModuleType, *, forward_to: logging.Logger = logger) -> Any:
    """Return an `ILogger` that forwards to `logging` and remembers errors.

    TensorRT's errors become exceptions of ours, and its warnings are notes on how it reads the
    graph; so errors arrive as INFO, everything else as DEBUG. `errors` holds the errors so far,
    oldest first; who starts an operation clears it.

    Args:
        trt: Module of `trt_module`.
        forward_to: Where messages go.
    """
    severities = trt.ILogger

    class ForwardingLogger(trt.ILogger):  # type: ignore[name-defined]
        """TensorRT's messages as log records."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Take one message; TensorRT calls this, from several threads."""
            is_error = severity in (severities.INTERNAL_ERROR, severities.ERROR)
            if is_error:
                self.errors.append(message)
            forward_to.log(logging.INFO if is_error else logging.DEBUG, "%s", message)

    return ForwardingLogger()
