"""Folders of engines as `build` leaves them, with bytes of the test's own in the files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dllava_export.backends.trt.engine_config import (
    EngineConfig,
    EngineFile,
    ProfileShapes,
    bundle_digest,
    engine_folder,
    write_engine_config,
)

__all__ = [
    "BACKEND",
    "VERSION",
    "add_engines",
    "make_config",
    "write_bundle_with_engines",
]

BACKEND, VERSION = "tensorrt-rtx", "1.7.1.116"
DECODER = {"decoder.engine": b"decoder engine"}
_MANIFEST = {"files": {"llm/model.onnx": {"size": 1, "sha256": "a" * 64}}}
_ROWS = {
    "prefill": {"position_ids": ProfileShapes((1, 1), (1, 8), (2, 16))},
    "decode": {"position_ids": ProfileShapes((1, 1), (1, 1), (2, 1))},
}


def make_config(**changes: Any) -> EngineConfig:
    """Return the configuration of small engines without a file."""
    values = {
        "backend": BACKEND,
        "backend_version": VERSION,
        "compute_capabilities": (),
        "precision": "fp16",
        "max_batch_size": 2,
        "max_input_len": 16,
        "capacities": {"full": 33, "sparse": 25},
        "is_stripped": False,
        "engines": {},
        "not_built": {},
        "plugins": {"KVCacheAttention": "body"},
        "bundle_digest": "0" * 64,
        "timing_cache": None,
        "tool_versions": {},
    }
    return EngineConfig(**{**values, **changes})


def add_engines(bundle: Path, engines: dict[str, bytes] = DECODER, **changes: Any) -> Path:
    """Put engine files and their configuration into a bundle; return the bundle."""
    folder = engine_folder(bundle, changes.get("backend", BACKEND))
    folder.mkdir(parents=True)
    entries = {}
    for file, contents in engines.items():
        (folder / file).write_bytes(contents)
        digest = hashlib.sha256(contents).hexdigest()
        entries[Path(file).stem] = EngineFile(file, digest, len(contents), _ROWS)
    digest = bundle_digest(bundle)
    config = make_config(**{"engines": entries, "bundle_digest": digest, **changes})
    write_engine_config(folder, config)
    return bundle


def write_bundle_with_engines(bundle: Path, engines: dict[str, bytes] = DECODER) -> Path:
    """Write a folder that has a bundle's list of files, and engines."""
    bundle.mkdir()
    (bundle / "dllava_export.json").write_text(json.dumps(_MANIFEST), encoding="utf-8")
    return add_engines(bundle, engines)
