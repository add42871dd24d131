"""ONNX Runtime as a backend: its options, and what it can do here."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export.backends.factory import BackendFactory, BackendStatus, option
from dllava_export.backends.gpus import Gpu
from dllava_export.backends.ort.providers import PROVIDERS
from dllava_export.extras import installed_version

if TYPE_CHECKING:
    from dllava_export.backends.backend import Backend
    from dllava_export.bundles.manifest import Manifest

__all__ = ["OrtFactory", "OrtOptions"]


@dataclasses.dataclass(frozen=True)
class OrtOptions:
    """Options of ONNX Runtime.

    Attributes:
        provider: Where it computes: `cpu`, or `cuda` for an NVIDIA GPU.
        num_threads: CPU threads; ONNX Runtime's own default where None.
    """

    provider: str = option(
        PROVIDERS[0],
        "--provider",
        f"Where ONNX Runtime computes; cuda needs an NVIDIA GPU.  [default: {PROVIDERS[0]}]",
        PROVIDERS,
    )
    num_threads: int | None = option(None, "--threads", "CPU threads of ONNX Runtime.")


class OrtFactory(BackendFactory):
    """ONNX Runtime on the CPU, or on an NVIDIA GPU with CUDA."""

    name = "onnxruntime"
    summary = "ONNX Runtime: on any CPU, or on NVIDIA GPUs with CUDA"
    options = OrtOptions

    def open(
        self, folder: Path, manifest: Manifest, options: Any, *, verify: bool = True
    ) -> Backend:
        """Open a bundle; `verify` has no effect, since there are no files of its own."""
        from dllava_export.backends.ort.backend import OrtBackend

        return OrtBackend(
            folder, manifest, provider=options.provider, num_threads=options.num_threads
        )

    def status(self, gpus: tuple[Gpu, ...]) -> BackendStatus:
        """Say which execution providers there are."""
        version = installed_version("onnxruntime-gpu", "onnxruntime")
        providers: tuple[str, ...] = ()
        if version is None:
            summary = "bundles cannot run"
        else:
            try:
                import onnxruntime

                providers = tuple(onnxruntime.get_available_providers())
                summary = _describe_providers(providers, bool(gpus))
            # A missing system library shows as ImportError, a clash of wheels as AttributeError.
            except (ImportError, AttributeError) as error:
                summary = f"installed, but cannot be imported: {error}"
        return BackendStatus(
            name=self.name,
            version=version,
            can_run=bool(providers),
            summary=summary,
            install="pip install "
            + ("onnxruntime" if platform.system() == "Darwin" else "onnxruntime-gpu"),
            providers=providers,
        )


def _describe_providers(providers: tuple[str, ...], has_gpu: bool) -> str:
    if "CUDAExecutionProvider" not in providers:
        return "runs bundles on the CPU"
    if has_gpu:
        return "runs bundles on the CPU; CUDA is built in and a GPU is there"
    return "runs bundles on the CPU; CUDA is built in, but no GPU is there"
