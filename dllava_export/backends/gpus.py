"""NVIDIA GPUs of this machine."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess

from dllava_export.extras import installed_version

__all__ = ["Gpu", "find_gpus"]

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


def find_gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that can be seen, by nvidia-smi or else by PyTorch."""
    return _gpus_from_nvidia_smi() or _gpus_from_torch(installed_version("torch"))


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
