"""Where ONNX Runtime computes: on the CPU, or on an NVIDIA GPU, never silently elsewhere."""

from __future__ import annotations

import collections
import contextlib
import io
import logging
from typing import TYPE_CHECKING, Any

from dllava_export.errors import BackendError

if TYPE_CHECKING:
    import onnxruntime as ort


__all__ = ["PROVIDERS", "check_provider", "execution_providers", "log_nodes_on_cpu"]

logger = logging.getLogger(__name__)

PROVIDERS = ("cpu", "cuda")

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INSTALL = (
    'pip install "onnxruntime-gpu[cuda,cudnn]" (and uninstall onnxruntime, which hides it)'
)
# Predictors compute in float32 and a near-tie decides which tokens survive: TF32 has 10 bits.
_CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0"}


def execution_providers(provider: str) -> list[Any]:
    """Return what an inference session is opened with.

    Args:
        provider: `cpu` or `cuda`.

    Raises:
        BackendError: If there is no such provider, or ONNX Runtime was built without it.
    """
    if provider not in PROVIDERS:
        raise BackendError(
            f"There is no provider {provider!r} for ONNX Runtime; expected "
            f"{' or '.join(PROVIDERS)}."
        )
    if provider == "cpu":
        return [_CPU]
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if _CUDA not in available:
        raise BackendError(
            f"This ONNX Runtime {onnxruntime.__version__} was built for {', '.join(available)}, "
            f"without CUDA. Install one with it: {_INSTALL}"
        )
    _preload_libraries(onnxruntime)
    return [(_CUDA, _CUDA_OPTIONS), _CPU]


def check_provider(session: ort.InferenceSession, provider: str) -> None:
    """Check that a session computes where it was asked to.

    Where CUDA cannot be set up, ONNX Runtime prints a warning and goes on on the CPU.

    Raises:
        BackendError: If it went to the CPU instead of the GPU.
    """
    if provider == "cuda" and _CUDA not in session.get_providers():
        import onnxruntime

        raise BackendError(
            "ONNX Runtime could not use CUDA and fell back to the CPU: no NVIDIA driver, no GPU, "
            f"or no CUDA {onnxruntime.cuda_version} libraries (its lines on stderr say which). "
            f"Install them: {_INSTALL}; or choose --provider cpu."
        )


def log_nodes_on_cpu(session: ort.InferenceSession) -> None:
    """Tell which ops of a CUDA session run on the CPU: those without a CUDA kernel."""
    counts = collections.Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _CPU
        for node in part.get_nodes()
    )
    if counts:
        listed = ", ".join(f"{op} x {count}" for op, count in sorted(counts.items()))
        logger.info("Without a CUDA kernel, computed on the CPU: %s", listed)


def _preload_libraries(onnxruntime: Any) -> None:
    """Let ONNX Runtime find CUDA's libraries in NVIDIA's pip packages; it prints, we log."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        onnxruntime.preload_dlls()
    for line in output.getvalue().splitlines():
        logger.debug("%s", line)
