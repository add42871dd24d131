"""Which engine files of a bundle may be run here, and with which shapes.

Everything in this file is decided without a GPU.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dllava_export.backends.kv_plan import SPARE_ROWS, KVPlan
from dllava_export.backends.trt.engine_config import (
    EngineConfig,
    EngineFile,
    ProfileShapes,
    bundle_digest,
    engine_folder,
    file_digest,
    read_engine_config,
)
from dllava_export.errors import BackendError, CapacityError
from dllava_export.names import BATCH, ROWS

__all__ = [
    "build_command",
    "check_device",
    "check_plan",
    "check_request",
    "checked_config",
    "engine_bytes",
    "engine_entry",
]

logger = logging.getLogger(__name__)

_DIM_OPTIONS = {BATCH: "--max-batch-size", ROWS: "--max-input-len"}


def build_command(folder: Path, backend: str) -> str:
    """Return the command that builds a bundle's engines."""
    return f"dllava-export build {folder} --backend {backend}"


def checked_config(folder: Path, backend: str, backend_version: str) -> EngineConfig:
    """Read what engines a bundle has, and check that they are of this bundle and this version.

    Args:
        folder: The bundle.
        backend: `tensorrt` or `tensorrt-rtx`.
        backend_version: Of the library that is installed.

    Raises:
        BackendError: If there are none, or another version or another bundle made them.
    """
    config = read_engine_config(folder, backend)
    remedy = f"Build them again: {build_command(folder, backend)}"
    if config.backend_version != backend_version:
        raise BackendError(
            f"The engines of {folder} were built by {backend} {config.backend_version}; "
            f"{backend_version} is installed, and engines only run in the version that built "
            f"them. {remedy}"
        )
    found = bundle_digest(folder)
    if config.bundle_digest != found:
        raise BackendError(
            f"The engines of {folder} were built from other graphs or weights (digest "
            f"{config.bundle_digest[:12]}…) than the bundle has now ({found[:12]}…). {remedy}"
        )
    return config


def engine_entry(config: EngineConfig, name: str, folder: Path) -> EngineFile:
    """Return one engine's entry.

    Raises:
        BackendError: If it was not built; the message says why.
    """
    if name in config.engines:
        return config.engines[name]
    reason = config.not_built.get(name, "it was left out")
    raise BackendError(
        f"{folder} has no {name} engine for {config.backend}: {reason} What needs it runs with "
        "--backend onnxruntime."
    )


def engine_bytes(folder: Path, config: EngineConfig, name: str, *, verify: bool) -> np.ndarray:
    """Return an engine file as [num_bytes] uint8, mapped: it may be larger than free memory.

    Args:
        folder: The bundle.
        config: Its engines.
        name: Which one.
        verify: Compare its digest as well as its size.

    Raises:
        BackendError: If it is missing, cut off or changed.
    """
    entry = engine_entry(config, name, folder)
    path = engine_folder(folder, config.backend) / entry.file
    remedy = f"Build the engines again: {build_command(folder, config.backend)}"
    if not path.is_file():
        raise BackendError(f"{path} is missing; config.json beside it lists it. {remedy}")
    size = path.stat().st_size
    if size != entry.num_bytes:
        raise BackendError(
            f"{path} has {size} bytes, config.json beside it says {entry.num_bytes}. {remedy}"
        )
    if verify and (digest := file_digest(path)) != entry.sha256:
        raise BackendError(
            f"{path} is damaged: its digest is {digest[:12]}…, config.json beside it says "
            f"{entry.sha256[:12]}…. {remedy}"
        )
    return np.memmap(path, np.uint8, "r")


def check_device(config: EngineConfig, name: str, compute_capability: str) -> None:
    """Check that the engines were built for a GPU of this kind.

    Raises:
        BackendError: If they were built for others only.
    """
    built_for = config.compute_capabilities
    if built_for and compute_capability not in built_for:
        option = (
            f" with --compute-capability {compute_capability}"
            if config.backend == "tensorrt-rtx"
            else " on this machine"
        )
        raise BackendError(
            f"The engines were built for compute capability {', '.join(built_for)}; this GPU, "
            f"{name}, has {compute_capability}. Build them again{option}."
        )


def check_plan(config: EngineConfig, plan: KVPlan) -> KVPlan:
    """Return the cache buffers that the engine really has: never fewer rows than asked for.

    Raises:
        BackendError: If the batch is larger than the engine's.
        CapacityError: If the engine's caches have fewer rows than planned.
    """
    if plan.batch > config.max_batch_size:
        raise BackendError(
            f"The batch has {plan.batch} samples, the engines take {config.max_batch_size} at "
            f"most. Use smaller batches, or build with --max-batch-size {plan.batch}."
        )
    for group, wanted in plan.capacities.items():
        found = config.capacities[group]
        if wanted > found:
            raise CapacityError(
                f"The {group} KV caches need {wanted - SPARE_ROWS} rows, the engine's have "
                f"{found - SPARE_ROWS}. Ask for less with max_new_tokens, shorten the prompt, "
                "or build with a larger --max-kv-cache-capacity."
            )
    return dataclasses.replace(
        plan, capacities={group: config.capacities[group] for group in plan.capacities}
    )


def check_request(
    engine: str,
    profile: str,
    ranges: Mapping[str, ProfileShapes],
    request: Mapping[str, Sequence[int] | np.ndarray],
    symbols: Mapping[str, Sequence[Any]],
) -> None:
    """Check that an optimization profile covers a run.

    Args:
        engine: The engine's name.
        profile: The profile's name.
        ranges: What it covers: input name → range.
        request: Input name → shape, or values where the profile has values.
        symbols: Input name → its shape with symbolic dimensions, to name the remedy.

    Raises:
        BackendError: If it does not.
    """
    for name, covered in ranges.items():
        if name not in request:
            raise BackendError(
                f"Profile {profile!r} of the {engine} engine has an input {name!r} that this "
                "version does not feed. Build the engines again."
            )
        found = tuple(int(size) for size in request[name])
        if len(found) == len(covered.min) and all(
            low <= size <= high
            for low, size, high in zip(covered.min, found, covered.max, strict=True)
        ):
            continue
        what = "values" if covered.is_values else "shape"
        raise BackendError(
            f"Profile {profile!r} of the {engine} engine covers {name!r} with {what} "
            f"{_text(covered.min)} to {_text(covered.max)}, the request has {_text(found)}. "
            + _remedy(name, found, covered, symbols.get(name, ()))
        )


def _remedy(
    name: str, found: Sequence[int], covered: ProfileShapes, symbols: Sequence[Any]
) -> str:
    if not covered.is_values:
        for symbol, size, high in zip(symbols, found, covered.max, strict=False):
            if size > high and symbol in _DIM_OPTIONS:
                return (
                    f"Build with {_DIM_OPTIONS[symbol]} {size}, or use smaller batches and "
                    "shorter prompts."
                )
    return f"Build with a range for {name} that covers it (--min-shapes, --max-shapes)."


def _text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
