"""What `BUNDLE/engines/<backend>/config.json` says of the engines beside it.

OUT/engines/tensorrt-rtx/
  config.json        this file's `EngineConfig`
  decoder.engine     prefill and decode, one optimization profile each
  visual.engine      CLIP tower and projector
  recompute.engine   decoder without KV cache, where the backend can build it
  timing.cache       where the backend has one
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllava_export import names
from dllava_export.bundles.layout import MANIFEST
from dllava_export.errors import BackendError, BundleError
from dllava_export.families.config_file import check_kinds
from dllava_export.families.config_kinds import (
    FLAG,
    OBJECT,
    TEXT,
    TEXTS,
    WHOLE,
    WHOLES,
    Kinds,
)
from dllava_export.json_text import parse_json
from dllava_export.reporting.output_files import write_text

__all__ = [
    "CONFIG_FILE",
    "DECODE",
    "DECODER_ENGINE",
    "ENGINES_FOLDER",
    "ENGINE_SCHEMA_VERSION",
    "PREFILL",
    "RECOMPUTE_ENGINE",
    "VISUAL_ENGINE",
    "EngineConfig",
    "EngineFile",
    "ProfileShapes",
    "bundle_digest",
    "engine_folder",
    "file_digest",
    "read_engine_config",
    "write_engine_config",
]

ENGINE_SCHEMA_VERSION = 1
ENGINES_FOLDER, CONFIG_FILE = "engines", "config.json"
DECODER_ENGINE, VISUAL_ENGINE, RECOMPUTE_ENGINE = "decoder", "visual", "recompute"
PREFILL, DECODE = "prefill", "decode"
"""Profiles of the decoder engine; the visual and the recompute engine have one, of their name."""

_MODEL_SUFFIXES = (".onnx", ".data", ".safetensors")
_CHUNK_BYTES = 1 << 20

_KINDS: Kinds = {
    "backend": (TEXT,),
    "backend_version": (TEXT,),
    "compute_capabilities": (TEXTS,),
    "precision": (TEXT,),
    "max_batch_size": (WHOLE,),
    "max_input_len": (WHOLE,),
    "capacities": (OBJECT,),
    "capacities.*": (WHOLE,),
    "is_stripped": (FLAG,),
    "engines": (OBJECT,),
    "engines.*": (OBJECT,),
    "engines.*.file": (TEXT,),
    "engines.*.sha256": (TEXT,),
    "engines.*.num_bytes": (WHOLE,),
    "engines.*.profiles": (OBJECT,),
    "engines.*.profiles.*": (OBJECT,),
    "engines.*.profiles.*.*": (OBJECT,),
    "engines.*.profiles.*.*.min": (WHOLES,),
    "engines.*.profiles.*.*.opt": (WHOLES,),
    "engines.*.profiles.*.*.max": (WHOLES,),
    "engines.*.profiles.*.*.is_values": (FLAG,),
    "not_built": (OBJECT,),
    "not_built.*": (TEXT,),
    "plugins": (OBJECT,),
    "plugins.*": (TEXT,),
    "bundle_digest": (TEXT,),
    "tool_versions": (OBJECT,),
    "tool_versions.*": (TEXT,),
}


@dataclasses.dataclass(frozen=True)
class ProfileShapes:
    """The range of one input in one optimization profile, inclusive on both ends.

    Attributes:
        min: Smallest shape; the smallest values where `is_values`.
        opt: Shape that kernels are chosen for.
        max: Largest shape.
        is_values: True for a shape tensor, whose *values* are given instead of its shape.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
    is_values: bool = False


@dataclasses.dataclass(frozen=True)
class EngineFile:
    """One built engine.

    Attributes:
        file: Name in the folder of the configuration.
        sha256: Digest of the whole file, in hexadecimal.
        num_bytes: Its size.
        profiles: Profile name → input name → range. Their order is TensorRT's profile index.
    """

    file: str
    sha256: str
    num_bytes: int
    profiles: dict[str, dict[str, ProfileShapes]]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What the engines of one backend were built from, for and with.

    Attributes:
        backend: `tensorrt` or `tensorrt-rtx`.
        backend_version: Version of the library that built them, for example `1.7.1.116`.
        compute_capabilities: What they were built for, for example `8.9`; empty for what the
            backend targets by itself.
        precision: `fp32`, `fp16` or `bf16`, as the bundle.
        max_batch_size: Samples at once.
        max_input_len: Rows that one run may feed per sample.
        capacities: Cache group → rows of each of its buffers, spare row included.
        is_stripped: True where the engines hold no weights and must be refitted from the
            bundle's graphs.
        engines: `decoder`, `visual`, `recompute` → its file. What was not built is absent.
        not_built: Engine name → why the backend has none.
        plugins: Custom op → `plugin` or `body`: how the engines compute it.
        bundle_digest: `bundle_digest` of the bundle that they were built from.
        timing_cache: Name of the timing cache file, or None.
        tool_versions: Versions of the tools that built them.
    """

    backend: str
    backend_version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    max_batch_size: int
    max_input_len: int
    capacities: dict[str, int]
    is_stripped: bool
    engines: dict[str, EngineFile]
    not_built: dict[str, str]
    plugins: dict[str, str]
    bundle_digest: str
    timing_cache: str | None
    tool_versions: dict[str, str]


def engine_folder(bundle_folder: Path, backend: str) -> Path:
    """Return where a bundle's engines for a backend lie."""
    return bundle_folder / ENGINES_FOLDER / backend


def bundle_digest(bundle_folder: Path) -> str:
    """Return one digest over the graphs and weights that a bundle's manifest lists.

    The manifest's own digests are hashed, not the files: this takes no time at 7B.

    Raises:
        BundleError: If there is no manifest, or it is damaged.
    """
    path = bundle_folder / MANIFEST
    try:
        files = parse_json(path.read_bytes())["files"]
        entries = {
            name: entry.get("blocks_sha256", entry["sha256"])
            for name, entry in sorted(files.items())
            if name.endswith(_MODEL_SUFFIXES)
        }
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}); expected a bundle. Make one with "
            "`dllava-export export CHECKPOINT OUT`."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error}). Export the bundle again.") from error
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_engine_config(folder: Path, config: EngineConfig) -> None:
    """Write the configuration into the engines' folder, whole or not at all."""
    document = {"schema_version": ENGINE_SCHEMA_VERSION, **dataclasses.asdict(config)}
    target = folder / CONFIG_FILE
    write_text(target, json.dumps(document, indent=2) + "\n")


def read_engine_config(bundle_folder: Path, backend: str) -> EngineConfig:
    """Read what a bundle's engines for a backend are; no engine file is opened.

    Args:
        bundle_folder: The bundle.
        backend: `tensorrt` or `tensorrt-rtx`.

    Raises:
        BackendError: If there are no engines for it, or the configuration is damaged or of
            another schema version.
    """
    path = engine_folder(bundle_folder, backend) / CONFIG_FILE
    command = f"dllava-export build {bundle_folder} --backend {backend}"
    remedy = f"Build the engines again: {command}"
    if not path.is_file():
        raise BackendError(
            f"{bundle_folder} has no engines for {backend}: {path} is missing. Build them: "
            f"{command}"
        )
    try:
        document = parse_json(path.read_bytes())
        version = document.pop("schema_version")
        if version != ENGINE_SCHEMA_VERSION:
            raise BackendError(
                f"{path} has schema version {version}; this dllava-export reads version "
                f"{ENGINE_SCHEMA_VERSION}. {remedy}"
            )
        return _config_from(document, path, remedy)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(f"{path} is damaged ({error}). {remedy}") from error


def _config_from(document: Mapping[str, Any], path: Path, remedy: str) -> EngineConfig:
    values = dict(document)
    if "capacities" not in values:  # as 0.1 wrote them
        values["capacities"] = {g: values.pop(names.capacity(g)) for g in names.GROUPS}
    where = f"{path} is damaged"
    check_kinds(values, _KINDS, where, BackendError, required=True, remedy=remedy)
    check_kinds(values, {"timing_cache": (TEXT,)}, where, BackendError, remedy=remedy)
    values["compute_capabilities"] = tuple(values["compute_capabilities"])
    values["engines"] = {
        name: EngineFile(**{**entry, "profiles": _profiles_from(entry["profiles"])})
        for name, entry in values["engines"].items()
    }
    return EngineConfig(**values)


def _profiles_from(document: Mapping[str, Any]) -> dict[str, dict[str, ProfileShapes]]:
    return {
        profile: {
            tensor: ProfileShapes(
                tuple(r["min"]), tuple(r["opt"]), tuple(r["max"]), r["is_values"]
            )
            for tensor, r in tensors.items()
        }
        for profile, tensors in document.items()
    }
