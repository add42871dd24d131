"""Which plugins there are, and how they get into TensorRT's registry."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

from dllava_export import names
from dllava_export.errors import BackendError

__all__ = ["PLUGIN_FOLDERS", "PLUGIN_OPS", "current_compute_capability", "register_plugins"]

logger = logging.getLogger(__name__)

PLUGIN_FOLDERS = {
    "SelectTokens": "select_tokens",
    "GatherTokens": "gather_tokens",
    "PredictorHead": "predictor_head",
    "KVCacheAttention": "kv_cache_attention",
}
"""Op to the folder of its plugin."""

PLUGIN_OPS = tuple(PLUGIN_FOLDERS)


def register_plugins(
    trt: ModuleType, *, compute_capability: int | None = None
) -> tuple[str, ...]:
    """Register all plugins with TensorRT; those that are registered already stay.

    An engine with `KVCacheAttention` needs the builder's preview feature
    `ALIASED_PLUGIN_IO_10_03`. Ops must be lowered first where `plugins/README.md` says so.

    Args:
        trt: TensorRT (`import tensorrt`), 10.15 or newer.
        compute_capability: Ten times major plus minor of the GPU that kernels are compiled
            for. None means the current CUDA device's, asked when an engine is built.

    Returns:
        Names of the ops that have a plugin, in namespace `names.PLUGIN_NAMESPACE`.

    Raises:
        BackendError: If this TensorRT takes no such plugins, or Triton is not installed.
    """
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise BackendError(
            f"{trt.__name__} {trt.__version__} takes no plugins that are compiled ahead of "
            "time, expected TensorRT 10.15 or newer (TensorRT-RTX has no plugins). "
            "The ops' bodies work without."
        )
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise BackendError(
            "The plugins' kernels are written in Triton, which is not installed, expected "
            "triton 3.5 or newer. Run: pip install triton. The ops' bodies work without."
        ) from error
    from dllava_export.plugins.quick_plugin import register_quick_plugin

    trtp = importlib.import_module("tensorrt.plugin")
    registry = trt.get_plugin_registry()
    capability = functools.cache(
        current_compute_capability
        if compute_capability is None
        else lambda: compute_capability
    )
    for op, folder in PLUGIN_FOLDERS.items():
        if registry.get_creator(op, names.PLUGIN_VERSION, names.PLUGIN_NAMESPACE) is not None:
            logger.debug("Plugin %s was registered before", op)
            continue
        package = f"{__package__}.{folder}"
        descriptor = importlib.import_module(f"{package}.descriptor").DESCRIPTOR
        kernel = importlib.import_module(f"{package}.kernel")
        register_quick_plugin(trt, trtp, descriptor, kernel, capability)
    return PLUGIN_OPS


def current_compute_capability() -> int:
    """Return ten times major plus minor of the current CUDA device.

    Raises:
        BackendError: If cuda-python is not installed or there is no device.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            "The GPU to compile plugins for is not known: cuda-python is not installed. Run: "
            "pip install cuda-python, or give the compute capability."
        ) from error
    attribute = runtime.cudaDeviceAttr
    status, device = runtime.cudaGetDevice()
    values = []
    for part in (
        attribute.cudaDevAttrComputeCapabilityMajor,
        attribute.cudaDevAttrComputeCapabilityMinor,
    ):
        if status == runtime.cudaError_t.cudaSuccess:
            status, value = runtime.cudaDeviceGetAttribute(part, device)
            values.append(value)
    if status != runtime.cudaError_t.cudaSuccess:
        raise BackendError(
            f"The GPU to compile plugins for is not known: CUDA says {status.name}. Build on "
            "the machine with the GPU, or give the compute capability."
        )
    return 10 * values[0] + values[1]
