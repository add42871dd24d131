"""What this machine has: package versions, GPUs, and what each backend can do here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

from dllava_export.backends.trt.trt_module import (
    TENSORRT,
    TENSORRT_RTX,
    target_compute_capabilities,
    trt_module,
)
from dllava_export.errors import BackendError

__all__ = ["BackendStatus", "DoctorReport", "Gpu", "collect", "find_gpus"]

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
_NVIDIA_SMI_SECONDS = 20
_MAX_NAME_PARTS = 4  # name, memory, driver, compute capability


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: Product name.
        memory_mib: Memory in MiB.
        driver: Driver version; None where only PyTorch could be asked.
        compute_capability: Such as `8.9`.
    """

    name: str
    memory_mib: int
    driver: str | None
    compute_capability: str


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine.

    Attributes:
        name: As in `--backend`.
        version: Of the installed package; None where there is none.
        can_run: Whether bundles run with it here.
        can_build: Whether it builds engines here; False for ONNX Runtime, which needs none.
        summary: What it can do here, in a sentence.
        install: The command that installs it.
        providers: ONNX Runtime execution providers that are built in; empty for the others.
    """

    name: str
    version: str | None
    can_run: bool
    summary: str
    install: str
    can_build: bool = False
    providers: tuple[str, ...] = ()


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
    packages = {name: _version(*candidates) for name, candidates in _PACKAGES.items()}
    gpus = find_gpus()
    return DoctorReport(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=packages,
        gpus=gpus,
        backends=(
            _onnxruntime_status(packages["onnxruntime"], bool(gpus)),
            _tensorrt_rtx_status(packages["tensorrt_rtx"], gpus),
            _tensorrt_status(packages["tensorrt"], gpus),
        ),
    )


def find_gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that can be seen, by nvidia-smi or else by PyTorch."""
    return _gpus_from_nvidia_smi() or _gpus_from_torch(_version("torch"))


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _onnxruntime_status(version: str | None, has_gpu: bool) -> BackendStatus:
    providers: tuple[str, ...] = ()
    if version is None:
        summary = "bundles cannot run"
    else:
        try:
            import onnxruntime

            providers = tuple(onnxruntime.get_available_providers())
            summary = _describe_providers(providers, has_gpu)
        # A missing system library shows as ImportError, a clash of wheels as AttributeError.
        except (ImportError, AttributeError) as error:
            summary = f"installed, but cannot be imported: {error}"
    return BackendStatus(
        name="onnxruntime",
        version=version,
        can_run=bool(providers),
        summary=summary,
        install="pip install "
        + ("onnxruntime" if platform.system() == "Darwin" else "onnxruntime-gpu"),
        providers=providers,
    )


def _tensorrt_rtx_status(version: str | None, gpus: tuple[Gpu, ...]) -> BackendStatus:
    can_build = can_run = False
    try:
        targets = target_compute_capabilities(trt_module(TENSORRT_RTX))
    except BackendError as error:
        summary = str(error) if version else "engines can be neither built nor run"
    else:
        can_build = True
        can_run = any(gpu.compute_capability in targets for gpu in gpus)
        summary = "builds engines and runs them" if can_run else "builds engines, runs none: "
        if not can_run:
            summary += (
                f"compute capability {gpus[0].compute_capability} is none of {', '.join(targets)}"
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


def _tensorrt_status(version: str | None, gpus: tuple[Gpu, ...]) -> BackendStatus:
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
            else "neither builds engines nor runs them: both need an NVIDIA GPU, and none is there"
        )
    return BackendStatus(
        name=TENSORRT,
        version=version,
        can_run=is_usable,
        can_build=is_usable,
        summary=summary,
        install='pip install "dllava-export[trt]"',
    )


def _describe_providers(providers: tuple[str, ...], has_gpu: bool) -> str:
    if "CUDAExecutionProvider" not in providers:
        return "runs bundles on the CPU"
    if has_gpu:
        return "runs bundles on the CPU; CUDA is built in and a GPU is there"
    return "runs bundles on the CPU; CUDA is built in, but no GPU is there"


def _gpus_from_nvidia_smi() -> tuple[Gpu, ...]:
    executable = shutil.which("nvidia-smi")
    if executable is None:
        return ()
    query = "name,memory.total,driver_version,compute_cap"
    try:
        finished = subprocess.run(
            [executable, f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in finished.stdout.splitlines():
        parts = [part.strip() for part in line.rsplit(",", _MAX_NAME_PARTS - 1)]
        # "[N/A]" stands where a GPU has no memory of its own.
        if len(parts) == _MAX_NAME_PARTS:
            name, memory, driver, capability = parts
            gpus.append(Gpu(name, int(memory) if memory.isdigit() else 0, driver, capability))
    return tuple(gpus)


def _gpus_from_torch(version: str | None) -> tuple[Gpu, ...]:
    # Importing torch takes seconds, and its CPU build knows no GPU.
    if version is None or "+cpu" in version:
        return ()
    try:
        import torch
    except (ImportError, OSError):
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        gpus.append(Gpu(found.name, found.total_memory // 2**20, None, capability))
    return tuple(gpus)


def _describe_gpu(gpu: Gpu) -> str:
    parts = [
        gpu.name,
        f"{gpu.memory_mib:,} MiB",
        f"compute capability {gpu.compute_capability}",
    ]
    if gpu.driver is not None:
        parts.append(f"driver {gpu.driver}")
    return ", ".join(parts)
