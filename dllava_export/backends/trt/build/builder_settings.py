"""Builder flags, target GPUs, plugin libraries and the timing cache of one build."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from dllava_export.backends.trt.build.build_options import BuildOptions
from dllava_export.backends.trt.engine_config import engine_folder
from dllava_export.backends.trt.trt_module import TENSORRT_RTX, target_compute_capabilities
from dllava_export.errors import BackendError
from dllava_export.reporting.output_files import replaced_when_complete

__all__ = ["TIMING_CACHE_FILE", "BuilderSettings"]

TIMING_CACHE_FILE = "timing.cache"


class BuilderSettings:
    """What all engines of one build share.

    Args:
        trt: Module of `trt_module`.
        folder: The bundle.
        options: What the user asked for.

    Raises:
        BackendError: If the backend cannot do it here.
    """

    def __init__(self, trt: ModuleType, folder: Path, options: BuildOptions) -> None:
        self._trt = trt
        self._options = options
        self.is_stripped = options.strip_weights
        self.compute_capabilities = options.compute_capabilities
        self._timing_cache: bytes | None = None
        self._timing_cache_file: Path | None = None
        if options.backend == TENSORRT_RTX:
            _check_targets(trt, options.compute_capabilities)
            _check_stripping(options)
        else:
            self.compute_capabilities = _compute_capabilities_here()
            self._load_plugins()
            self._read_timing_cache(folder)

    @property
    def timing_cache_name(self) -> str | None:
        """Name of the timing cache beside the engines; None where there is none."""
        return TIMING_CACHE_FILE if self._timing_cache is not None else None

    def apply(self, config: Any) -> None:
        """Set everything on a builder config.

        Raises:
            BackendError: If TensorRT refuses the timing cache.
        """
        options = self._options
        # Predictors compute in float32, and a near-tie decides which tokens survive.
        config.clear_flag(self._trt.BuilderFlag.TF32)
        if options.backend != TENSORRT_RTX:
            # The attention plugin updates its caches in place.
            feature = self._trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03
            config.set_preview_feature(feature, True)
        if options.builder_optimization_level is not None:
            config.builder_optimization_level = options.builder_optimization_level
        if options.strip_weights:
            config.set_flag(self._trt.BuilderFlag.STRIP_PLAN)
        if options.compute_capabilities:
            config.num_compute_capabilities = len(options.compute_capabilities)
            for index, value in enumerate(options.compute_capabilities):
                member = getattr(self._trt.ComputeCapability, f"SM{value.replace('.', '')}")
                config.set_compute_capability(member, index)
        if self._timing_cache is not None:
            cache = config.create_timing_cache(self._timing_cache)
            if not config.set_timing_cache(cache, ignore_mismatch=False):
                raise BackendError(
                    f"TensorRT refuses the timing cache {self._timing_cache_file}: it is of "
                    "another version or GPU. Remove it or name another --timing-cache-file."
                )

    def keep_timing_cache(self, config: Any) -> None:
        """Take over what a build added, for the next engine."""
        if self._timing_cache is not None:
            self._timing_cache = bytes(config.get_timing_cache().serialize())

    def save_timing_cache(self, folder: Path) -> None:
        """Write the cache beside the engines and, if the user named a file, there."""
        if self._timing_cache is None:
            return
        (folder / TIMING_CACHE_FILE).write_bytes(self._timing_cache)
        target = self._options.timing_cache_file
        if target is not None:
            with replaced_when_complete(target) as partial:
                partial.write_bytes(self._timing_cache)

    def _load_plugins(self) -> None:
        for path in self._options.plugin_paths:
            registry = self._trt.get_plugin_registry()
            if not path.is_file() or registry.load_library(str(path)) is None:
                what = "TensorRT cannot load it" if path.is_file() else "there is no such file"
                raise BackendError(
                    f"--plugin-path {path}: {what}; expected a shared library with TensorRT "
                    "plugins for this version."
                )

    def _read_timing_cache(self, folder: Path) -> None:
        options = self._options
        default = engine_folder(folder, options.backend) / TIMING_CACHE_FILE
        self._timing_cache_file = options.timing_cache_file or default
        found = self._timing_cache_file.is_file()
        self._timing_cache = self._timing_cache_file.read_bytes() if found else b""


def _check_targets(trt: ModuleType, wanted: tuple[str, ...]) -> None:
    known = target_compute_capabilities(trt)
    for value in wanted:
        if value not in known:
            raise BackendError(
                f"TensorRT-RTX {trt.__version__} does not build for compute capability {value}; "
                f"it builds for {', '.join(known)}."
            )


def _check_stripping(options: BuildOptions) -> None:
    from dllava_export.backends.gpus import find_gpus

    if options.strip_weights and not find_gpus():
        raise BackendError(
            "TensorRT-RTX strips weights on a machine with a GPU only: without one its build "
            "ends in a CUDA error. Leave out --strip-weights, or build where a GPU is."
        )


def _compute_capabilities_here() -> tuple[str, ...]:
    """TensorRT builds for the GPU at hand: the first one that is visible."""
    from dllava_export.backends.gpus import find_gpus

    return tuple(gpu.compute_capability for gpu in find_gpus()[:1])
