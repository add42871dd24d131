"""What this machine has: package versions, GPUs, and what each backend can do here."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

from dllava_export.backends.factory import BackendStatus
from dllava_export.backends.gpus import Gpu, find_gpus
from dllava_export.backends.registry import BACKENDS
from dllava_export.extras import installed_version

__all__ = ["DoctorReport", "collect"]

# Name shown, and the distributions that provide it; the first one installed counts.
_PACKAGES = {
    "dllava-export": ("dllava-export",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnx-graphsurgeon": ("onnx-graphsurgeon",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "polygraphy": ("polygraphy",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}


@dataclasses.dataclass(frozen=True)
class DoctorReport:
    """What `collect` found.

    Attributes:
        system: Operating system and machine.
        python: Python's version.
        packages: Version of each package; None where it is not installed.
        gpus: NVIDIA GPUs that can be seen.
        backends: All backends, installed or not.
    """

    system: str
    python: str
    packages: dict[str, str | None]
    gpus: tuple[Gpu, ...]
    backends: tuple[BackendStatus, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as values that `json.dumps` takes."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return the report as aligned plain text."""
        versions = {"system": self.system, "python": self.python, **self.packages}
        width = max(map(len, versions))
        lines = [f"{name:<{width}}  {value or '-'}" for name, value in versions.items()]
        lines += ["", "GPUs"]
        lines += [f"  {_describe_gpu(gpu)}" for gpu in self.gpus] or ["  no NVIDIA GPU found"]
        lines += ["", "Backends"]
        width = max(len(backend.name) for backend in self.backends)
        for backend in self.backends:
            found = backend.version or "not installed"
            lines.append(f"  {backend.name:<{width}}  {found}: {backend.summary}")
            if backend.providers:
                providers = ", ".join(backend.providers)
                lines.append(f"  {'':<{width}}  providers: {providers}")
            if backend.version is None:
                lines.append(f"  {'':<{width}}  to install: {backend.install}")
        return "\n".join(lines)


def collect() -> DoctorReport:
    """Look at this machine. Nothing is changed, downloaded or run on a GPU.

    What is absent or broken is reported as absent; nothing is raised for it.
    """
    packages = {name: installed_version(*candidates) for name, candidates in _PACKAGES.items()}
    gpus = find_gpus()
    return DoctorReport(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=packages,
        gpus=gpus,
        backends=tuple(factory.status(gpus) for factory in BACKENDS.usable()),
    )


def _describe_gpu(gpu: Gpu) -> str:
    parts = [
        gpu.name,
        f"{gpu.memory_mib:,} MiB",
        f"compute capability {gpu.compute_capability}",
    ]
    if gpu.driver is not None:
        parts.append(f"driver {gpu.driver}")
    return ", ".join(parts)
