"""TensorRT and TensorRT-RTX as backends: their options, builds, and what they can do here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export.backends.factory import BackendFactory, BackendStatus
from dllava_export.backends.gpus import Gpu
from dllava_export.backends.trt.trt_module import (
    TENSORRT,
    TENSORRT_RTX,
    target_compute_capabilities,
    trt_module,
)
from dllava_export.errors import BackendError
from dllava_export.extras import installed_version
from dllava_export.settings import settings_from

if TYPE_CHECKING:
    from dllava_export.backends.backend import Backend
    from dllava_export.backends.trt.build.build_plan import BuildPlan
    from dllava_export.backends.trt.build.build_report import BuildReport
    from dllava_export.bundles.manifest import Manifest

__all__ = ["TensorRTFactory", "TensorRTRTXFactory", "TrtOptions"]


@dataclasses.dataclass(frozen=True)
class TrtOptions:
    """Options of both TensorRTs.

    Attributes:
        cuda_graph: Run decode steps as a CUDA graph.
    """

    cuda_graph: bool = True


class _TrtFactory(BackendFactory):
    options = TrtOptions
    can_build = True

    def open(
        self, folder: Path, manifest: Manifest, options: Any, *, verify: bool = True
    ) -> Backend:
        """Load the engines that `build` made."""
        from dllava_export.backends.trt.backend import TrtBackend

        return TrtBackend(
            folder, manifest, self.name, verify=verify, cuda_graph=options.cuda_graph
        )

    def build(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        dry_run: bool = False,
        progress: bool = False,
    ) -> BuildReport | BuildPlan:
        """Build an engine of each graph; `settings` are fields of `BuildOptions`."""
        from dllava_export.backends.trt.build.build_engines import build_engines
        from dllava_export.backends.trt.build.build_options import BuildOptions
        from dllava_export.backends.trt.build.build_plan import plan_build
        from dllava_export.bundles.manifest import read_manifest

        options = settings_from(BuildOptions, {"backend": self.name, **settings})
        if dry_run:
            return plan_build(folder, read_manifest(folder), options)
        return build_engines(folder, options, progress=progress)


class TensorRTFactory(_TrtFactory):
    """TensorRT, with plugins; builds for the GPU of this machine."""

    name = TENSORRT
    summary = "TensorRT engines with plugins, built on a machine with an NVIDIA GPU"

    def status(self, gpus: tuple[Gpu, ...]) -> BackendStatus:
        """Say whether engines can be built and run."""
        version = installed_version(
            "tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings"
        )
        is_usable = False
        try:
            trt_module(TENSORRT)
        except BackendError as error:
            summary = str(error) if version else "engines can be neither built nor run"
        else:
            is_usable = bool(gpus)
            summary = (
                "builds engines, with plugins, and runs them"
                if is_usable
                else "neither builds engines nor runs them: both need an NVIDIA GPU, and "
                "none is there"
            )
        return BackendStatus(
            name=TENSORRT,
            version=version,
            can_run=is_usable,
            can_build=is_usable,
            summary=summary,
            install='pip install "dllava-export[trt]"',
        )


class TensorRTRTXFactory(_TrtFactory):
    """TensorRT-RTX; builds without a GPU."""

    name = TENSORRT_RTX
    summary = "TensorRT-RTX engines, built without a GPU, run on NVIDIA RTX GPUs"

    def status(self, gpus: tuple[Gpu, ...]) -> BackendStatus:
        """Say whether engines can be built and run."""
        version = installed_version("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
        can_build = can_run = False
        try:
            targets = target_compute_capabilities(trt_module(TENSORRT_RTX))
        except BackendError as error:
            summary = str(error) if version else "engines can be neither built nor run"
        else:
            can_build = True
            can_run = any(gpu.compute_capability in targets for gpu in gpus)
            summary = (
                "builds engines and runs them" if can_run else "builds engines, runs none: "
            )
            if not can_run:
                summary += (
                    f"compute capability {gpus[0].compute_capability} is none of "
                    f"{', '.join(targets)}"
                    if gpus
                    else "that needs an NVIDIA GPU, and none is there"
                )
        return BackendStatus(
            name=TENSORRT_RTX,
            version=version,
            can_run=can_run,
            can_build=can_build,
            summary=summary,
            install='pip install "dllava-export[trt-rtx]"',
        )
