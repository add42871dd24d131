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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllava_export.bundles.digests import file_entry, is_unchanged
from dllava_export.bundles.layout import MANIFEST
from dllava_export.errors import BundleError
from dllava_export.geometry import Geometry, PredictorGeometry
from dllava_export.precision import Precision
from dllava_export.reporting.output_files import replaced_when_complete
from dllava_export.sparsity import Sparsity

__all__ = ["SCHEMA_VERSION", "Manifest", "read_manifest", "write_manifest"]

SCHEMA_VERSION = 2


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
        chat_template: `vicuna_v1`, `checkpoint`, or None without a tokenizer.
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


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Read a bundle's manifest and check that its files are the ones it was written for.

    Args:
        folder: The bundle.
        verify: Compare digests as well as sizes.

    Raises:
        BundleError: If there is no manifest, it is of another schema version or damaged, or a
            file is missing or was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        kind = "has no " + MANIFEST if folder.is_dir() else "is not a folder"
        raise BundleError(
            f"{folder} {kind}; expected a bundle. Make one with "
            "`dllava-export export CHECKPOINT OUT`."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = int(document.pop("schema_version"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error}). Export the bundle again.") from error
    if not 1 <= version <= SCHEMA_VERSION:
        remedy = "Update dllava-export" if version > SCHEMA_VERSION else "Export it again"
        raise BundleError(
            f"{folder} has bundle schema version {version}; this dllava-export reads versions "
            f"1 to {SCHEMA_VERSION}. {remedy}."
        )
    try:
        if version == 1:
            document = _from_schema_1(document)
        _check_files(folder, document.pop("files"), verify)
        return _manifest_from(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error}). Export the bundle again.") from error


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


def _check_files(folder: Path, files: dict[str, dict[str, Any]], verify: bool) -> None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(
                f"{folder} lacks {name}. Copy the whole bundle, or export it again."
            )
        size = path.stat().st_size
        if size != expected["size"] or (
            verify and not is_unchanged(path, expected, full=False)
        ):
            found = f"has {size} bytes" if size != expected["size"] else "has other contents"
            raise BundleError(
                f"{path} was changed after the bundle was written: it {found}, the manifest "
                f"says {expected['size']} bytes, digest {expected['sha256'][:12]}…. Weights may "
                "be hard links to the checkpoint's files: was the checkpoint changed in place? "
                "Export again."
            )
