"""A bundle on disk: graphs, weights, tokenizer and a manifest that says what belongs to it.

    OUT/
      dllava_export.json             the manifest, with size and digest of every other file
      llm/model.onnx                 decoder, prefill and decode, with KV cache
      llm/recompute.onnx             decoder without KV cache
      llm/dense.onnx                 decoder as traced; what `sparsify` and `bench` start from
      llm/predictors.onnx            trained predictors, if any: initializers without a graph
      llm/*.data, *.safetensors      weights, once for all graphs; token embeddings
      llm/tokenizer*, config.json    tokenizer and configuration of the checkpoint
      visual/model.onnx, *.data      CLIP tower and projector; preprocessor_config.json

A bundle is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dllava_export.bundles.digests import file_entry, is_unchanged
from dllava_export.bundles.layout import DECODER, LLM_FOLDER, MANIFEST, VISUAL_FOLDER
from dllava_export.errors import BundleError, SettingError
from dllava_export.families.config_file import check_kinds
from dllava_export.families.config_kinds import (
    FLAG,
    LIST,
    NUMBER,
    OBJECT,
    TEXT,
    WHOLE,
    WHOLES,
    Kinds,
    below,
)
from dllava_export.geometry import Geometry, PredictorGeometry
from dllava_export.json_text import parse_json
from dllava_export.precision import NUMBER_FORMATS, Precision
from dllava_export.reporting.output_files import replaced_when_complete
from dllava_export.sparsity import Sparsity

__all__ = ["SCHEMA_VERSION", "Manifest", "Verification", "read_manifest", "write_manifest"]

SCHEMA_VERSION = 2

Verification = bool | Literal["full"]
"""What of a bundle's files is compared with its manifest.

False: their sizes. True, the quick check: digests as well; those of files above 256 MiB cover
64 evenly spread MiB, so that it takes no time, and finds a replaced or truncated file but not
every changed byte. `full`: every byte.
"""

_REMEDY = "Export the bundle again."
_PARTS = ("weights", "activations", "cache")
_GEOMETRY_KINDS: Kinds = {
    field.name: (WHOLE,) for field in dataclasses.fields(Geometry) if field.name != "predictor"
}
_REQUIRED: Kinds = {
    "layout": (TEXT,),
    **below("precision", {part: (TEXT,) for part in _PARTS}),
    **below("geometry", _GEOMETRY_KINDS),
    "max_position_embeddings": (WHOLE,),
    "sparsity": (OBJECT,),
    "image_token_id": (WHOLE,),
    "image_aspect_ratio": (TEXT,),
    "has_visual": (FLAG,),
    "eos_token_ids": (WHOLES,),
    "tensors": (OBJECT,),
    "tensors.*": (OBJECT,),
    "passes": (OBJECT,),
    "passes.*": (LIST,),
    "producer": (OBJECT,),
    "producer.*": (TEXT,),
    "source": (TEXT,),
    "files": (OBJECT,),
    "files.*": (OBJECT,),
    "files.*.size": (WHOLE,),
    "files.*.sha256": (TEXT,),
}
_OPTIONAL: Kinds = {
    "family": (TEXT,),
    "chat_template": (TEXT,),
    "embedding": (OBJECT,),
    "geometry.predictor": (OBJECT,),
    "geometry.predictor.*": (WHOLE,),
    "sparsity.policy": (TEXT,),
    "sparsity.sparse_layer": (WHOLE,),
    "sparsity.image_keep_rate": (NUMBER,),
    "sparsity.image_keep_tokens": (WHOLE,),
    "sparsity.output_text_keep_rate": (NUMBER,),
    "sparsity.output_text_policy": (TEXT,),
    "files.*.sampled": (FLAG,),
    "files.*.blocks_sha256": (TEXT,),
}
_EMBEDDING: Kinds = below(
    "embedding", {"file": (TEXT,), "offset": (WHOLE,), "dtype": (TEXT,), "shape": (WHOLES,)}
)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        family: Model family, as `families.registry` has it; None for a bare decoder.
        layout: Checkpoint layout it came from, or `onnx` for a bare decoder.
        precision: Of weights, activations and KV cache.
        geometry: Sizes of the model.
        max_position_embeddings: Tokens the decoder was made for: the largest cache.
        sparsity: What is pruned.
        image_token_id: Id of the image placeholder in the checkpoint's tokenizer; -200 where
            it has none.
        image_aspect_ratio: How pictures become square.
        has_visual: True where the bundle takes pictures.
        embedding: Reference for `weights.EmbeddingTable`, or None.
        chat_template: A name of `families.chat_templates`, or `checkpoint`, the template beside
            the tokenizer; None without a tokenizer.
        eos_token_ids: Ids that end an answer.
        tensors: Graph file → `inputs` and `outputs`, each with name, dtype and shape.
        passes: What each pass of each graph did.
        producer: Versions of the tools that made it.
        source: Where the weights came from, for people.
    """

    family: str | None
    layout: str
    precision: Precision
    geometry: Geometry
    max_position_embeddings: int
    sparsity: Sparsity
    image_token_id: int
    image_aspect_ratio: str
    has_visual: bool
    embedding: dict[str, Any] | None
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    tensors: dict[str, dict[str, list[dict[str, Any]]]]
    passes: dict[str, list[dict[str, Any]]]
    producer: dict[str, str]
    source: str


def write_manifest(
    folder: Path,
    manifest: Manifest,
    digest_of: Callable[[Path], str | None] = lambda _: None,
) -> None:
    """Write the manifest last, over all files that are there.

    Args:
        folder: The bundle.
        manifest: What it holds.
        digest_of: Gives the `whole_digest` of a file where it is known, else None.
    """
    values = {**dataclasses.asdict(manifest), "precision": manifest.precision.to_json()}
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {str(p.relative_to(folder)): file_entry(p, digest_of(p)) for p in paths}
    document = {"schema_version": SCHEMA_VERSION, **values, "files": files}
    target = folder / MANIFEST
    with replaced_when_complete(target, _as_it_is) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _as_it_is(error: OSError) -> OSError:
    # Whoever made the folder says what to do about a full disk.
    return error


def read_manifest(folder: Path, *, verify: Verification = True) -> Manifest:
    """Read a bundle's manifest and check that its files are the ones it was written for.

    Every file in the folders of the graphs must be in the manifest: what is read is listed.

    Args:
        folder: The bundle.
        verify: What to compare of the files, see `Verification`: sizes (False), digests, of
            large files at samples (True), or every byte (`full`).

    Raises:
        BundleError: If there is no manifest, it is of another schema version or damaged, or a
            file is missing, was added or was changed.
        SettingError: If there is no such verification.
    """
    if not isinstance(verify, bool) and verify != "full":
        raise SettingError(f"verify must be True, False or 'full', got {verify!r}.")
    path = folder / MANIFEST
    if not path.is_file():
        kind = "has no " + MANIFEST if folder.is_dir() else "is not a folder"
        raise BundleError(
            f"{folder} {kind}; expected a bundle. Make one with "
            "`dllava-export export CHECKPOINT OUT`."
        )
    try:
        document = parse_json(path.read_bytes(), unique_keys=True)
        check_version = {"schema_version": (WHOLE,)}
        _check_kinds(path, document, check_version)
        version = document.pop("schema_version")
    except (OSError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error}). {_REMEDY}") from error
    if not 1 <= version <= SCHEMA_VERSION:
        remedy = "Update dllava-export" if version > SCHEMA_VERSION else "Export it again"
        raise BundleError(
            f"{folder} has bundle schema version {version}; this dllava-export reads versions "
            f"1 to {SCHEMA_VERSION}. {remedy}."
        )
    try:
        if version == 1:
            document = _from_schema_1(document)
        _check_values(path, document)
        files = document.pop("files")
        manifest = _manifest_from(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error}). {_REMEDY}") from error
    _check_all_listed(folder, files)
    _check_files(folder, files, verify)
    return manifest


def _check_kinds(
    path: Path, document: Mapping[str, Any], kinds: Kinds, *, required: bool = True
) -> None:
    where = f"{path} is damaged"
    check_kinds(document, kinds, where, BundleError, required=required, remedy=_REMEDY)


def _check_values(path: Path, document: Mapping[str, Any]) -> None:
    """Check what a manifest holds: kinds, and numbers that are sizes."""
    _check_kinds(path, document, _REQUIRED)
    _check_kinds(path, document, _OPTIONAL, required=False)
    sizes = {f"geometry.{key}": document["geometry"][key] for key in _GEOMETRY_KINDS}
    sizes["max_position_embeddings"] = document["max_position_embeddings"]
    embedding = document["embedding"]
    if embedding is not None:
        _check_kinds(path, document, _EMBEDDING)
        if PurePosixPath(embedding["file"]).name != embedding["file"]:
            raise _damaged(
                path, "embedding.file", embedding["file"], "a name without a folder"
            )
        known = [number_format.stored_name for number_format in NUMBER_FORMATS.values()]
        if embedding["dtype"] not in known:
            raise _damaged(path, "embedding.dtype", embedding["dtype"], ", ".join(known))
        if len(embedding["shape"]) != 2:
            raise _damaged(path, "embedding.shape", embedding["shape"], "two sizes")
        sizes["embedding.shape"] = min(embedding["shape"])
        sizes["embedding.offset"] = embedding["offset"]
    for key, value in sizes.items():
        lowest = 0 if key in ("geometry.num_image_tokens", "embedding.offset") else 1
        if value < lowest:
            raise _damaged(path, key, value, f"at least {lowest}")
    if DECODER not in document["passes"]:
        raise _damaged(path, "passes", [*document["passes"]], f"an entry for {DECODER}")
    for graph, passes in document["passes"].items():
        for number, entry in enumerate(passes):
            if not isinstance(entry, dict) or not isinstance(entry.get("parameters"), dict):
                raise _damaged(path, f"passes.{graph}.{number}", entry, "a pass's parameters")
    for name in (*document["files"], *document["tensors"]):
        place = PurePosixPath(name.replace("\\", "/"))
        if not place.name or place.is_absolute() or ".." in place.parts or "\0" in name:
            raise _damaged(path, "files", name, "a file in the bundle")


def _damaged(path: Path, key: str, found: object, expected: str) -> BundleError:
    return BundleError(
        f"{path} is damaged: {key} is {found!r}, expected {expected}. {_REMEDY}"
    )


def _from_schema_1(document: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of 0.1 in today's form: it knew one family and one number format."""
    geometry = dict(document["geometry"])
    geometry.pop("bytes_per_value")
    precision = Precision.of(document["precision"]).to_json()
    family = None if document["layout"] == "onnx" else "llava"
    return {**document, "family": family, "precision": precision, "geometry": geometry}


def _manifest_from(document: dict[str, Any]) -> Manifest:
    geometry = dict(document.pop("geometry"))
    predictor = geometry.pop("predictor")
    return Manifest(
        **{
            **document,
            "geometry": Geometry(
                **geometry, predictor=PredictorGeometry(**predictor) if predictor else None
            ),
            "precision": Precision.from_json(document["precision"]),
            "sparsity": Sparsity(**document["sparsity"]),
            "eos_token_ids": tuple(document["eos_token_ids"]),
        }
    )


def _check_all_listed(folder: Path, files: Mapping[str, Any]) -> None:
    """Refuse a file that somebody added where tokenizers and runtimes look for theirs."""
    for path in _files_read(folder):
        name = path.relative_to(folder).as_posix()
        if name not in files:
            raise BundleError(
                f"{path} is not among the files of {folder / MANIFEST}: it was added after the "
                "bundle was written, and would be read. Remove it, or export the bundle again."
            )


def _files_read(folder: Path) -> Iterator[Path]:
    """Yield the files beside the graphs; hidden ones are read by nobody."""
    for part in (LLM_FOLDER, VISUAL_FOLDER):
        for path in sorted((folder / part).rglob("*")):
            if not path.is_dir() and not path.name.startswith("."):
                yield path


def _check_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], verify: Verification
) -> None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(
                f"{folder} lacks {name}. Copy the whole bundle, or export it again."
            )
        try:
            size = path.stat().st_size
            is_same = size == expected["size"] and (
                not verify or is_unchanged(path, expected, full=verify == "full")
            )
        except OSError as error:
            raise BundleError(
                f"{path} cannot be read ({error.strerror}), expected a file that the manifest "
                "lists. Change its rights, or copy the whole bundle again."
            ) from error
        if not is_same:
            found = f"has {size} bytes" if size != expected["size"] else "has other contents"
            raise BundleError(
                f"{path} was changed after the bundle was written: it {found}, the manifest "
                f"says {expected['size']} bytes, digest {expected['sha256'][:12]}…. Weights may "
                "be hard links to the checkpoint's files: was the checkpoint changed in place? "
                "Export again."
            )
