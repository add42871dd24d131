"""Compare what a manifest says with the graphs and weights that it describes.

Only structure is read: this takes about a millisecond, at 7B as well.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.files import describe_tensors
from dllava_export.bundles.manifest import Manifest
from dllava_export.checkpoints.tensor_source import safetensors_sources
from dllava_export.errors import BundleError, CheckpointError
from dllava_export.precision import NUMBER_FORMATS
from dllava_export.short_text import shortened

if TYPE_CHECKING:
    import onnx

__all__ = ["check_graphs"]

_MAX_SHOWN = 200
_SELECTION, _KEEP_BIT = "InsertImageSelectionPass", "InsertKeepBitPass"


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Check that a manifest fits the graphs and the embeddings beside it.

    Compared are inputs and outputs of all graphs, number of layers, first sparse layer, heads,
    sizes, number formats, keep bit, policies and keep rate of the passes, and the place of the
    token embeddings.

    Args:
        folder: The bundle.
        manifest: As it was read.

    Raises:
        BundleError: If they contradict each other, or a graph cannot be read.
    """
    try:
        _compare(folder, manifest)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"A graph of {folder} lacks inputs, outputs or sizes that every bundle has "
            f"({error!r}). Export the bundle again."
        ) from error


def _compare(folder: Path, manifest: Manifest) -> None:
    decoder = f"{layout.LLM_FOLDER}/{layout.DECODER}"
    visual = f"{layout.VISUAL_FOLDER}/{layout.VISUAL}"
    graphs = {name: _graph(folder, name) for name in manifest.tensors}
    for name in (decoder, *([visual] if manifest.has_visual else [])):
        if name not in graphs:
            raise _contradiction(
                folder, "tensors", [*graphs], name, "part of every such bundle"
            )
    for name, model in graphs.items():
        parent, file = name.rsplit("/", 1)
        found = json.loads(json.dumps(describe_tensors(parent, {file: model}).get(name)))
        if found != manifest.tensors[name]:
            where = _first_difference(manifest.tensors[name], found)
            raise _contradiction(
                folder, f"tensors.{name}.{where[0]}", where[1], name, where[2]
            )
    said, found = _said(manifest), _facts(graphs[decoder])
    if manifest.has_visual:
        features = _shape(graphs[visual].graph.output[0])
        said["geometry.num_image_tokens"] = manifest.geometry.num_image_tokens
        found["geometry.num_image_tokens"] = features[1]
    for key, value in said.items():
        if value != found[key]:
            raise _contradiction(folder, key, value, decoder, found[key])
    _check_passes(folder, manifest)
    if manifest.embedding is not None:
        _check_embedding(folder, manifest, manifest.embedding)


def _contradiction(
    folder: Path, key: str, said: object, where: str, found: object
) -> BundleError:
    ours, theirs = (shortened(value, _MAX_SHOWN) for value in (said, found))
    return BundleError(
        f"{folder / layout.MANIFEST} says {key} {ours}, {where} has {theirs}: one of them was "
        "changed. Export the bundle again."
    )


def _graph(folder: Path, name: str) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(folder / name, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(
            f"{folder / name} cannot be read ({error}), expected a graph that the manifest "
            "lists. Copy the whole bundle, or export it again."
        ) from error


def _first_difference(said: dict[str, Any], found: Any) -> tuple[str, object, object]:
    """Return (key, what the manifest says, what the graph has)."""
    for key in ("inputs", "outputs"):
        ours, theirs = said.get(key), found.get(key) if isinstance(found, dict) else None
        if not isinstance(ours, list) or not isinstance(theirs, list):
            return key, ours, theirs
        for pair in itertools.zip_longest(ours, theirs):
            if pair[0] != pair[1]:
                return key, *pair
    return "keys", list(said), list(found)


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _dtype_name(value: onnx.ValueInfoProto) -> str:
    import onnx

    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _said(manifest: Manifest) -> dict[str, object]:
    """Return what the manifest says, key → value."""
    geometry, sparsity = manifest.geometry, manifest.sparsity
    first = geometry.num_layers if sparsity.is_dense else sparsity.sparse_layer
    return {
        "geometry.num_layers": geometry.num_layers,
        "sparsity.sparse_layer": list(range(first, geometry.num_layers)),
        "geometry.num_heads": {geometry.num_heads},
        "geometry.num_kv_heads": {geometry.num_kv_heads},
        "geometry.head_dim": {geometry.head_dim},
        "geometry.hidden_size": geometry.hidden_size,
        "geometry.vocab_size": geometry.vocab_size,
        "precision.activations": manifest.precision.activations.dtype_name,
        "precision.cache": {manifest.precision.cache.dtype_name},
        "sparsity.output_text_keep_rate": sparsity.has_keep_bit,
    }


def _facts(decoder: onnx.ModelProto) -> dict[str, object]:
    """Return the same of a decoder's graph; layers from `sparse_layer` on by their numbers."""
    inputs = {value.name: value for value in decoder.graph.input}
    outputs = {value.name: value for value in decoder.graph.output}
    layers = 0
    while names.past(layers, "key") in inputs:
        layers += 1
    keys = [_shape(inputs[names.past(layer, "key")]) for layer in range(layers)]
    caches = [value for name, value in inputs.items() if names.is_past(name)]
    sparse = names.capacity(names.SPARSE)
    heads = {
        attribute.i
        for node in decoder.graph.node
        if node.op_type == "KVCacheAttention"
        for attribute in node.attribute
        if attribute.name == "num_heads"
    }
    embeds, logits = inputs.get(names.INPUTS_EMBEDS), outputs.get(names.LOGITS)
    return {
        "geometry.num_layers": layers,
        "sparsity.sparse_layer": [i for i, shape in enumerate(keys) if shape[2] == sparse],
        "geometry.num_heads": heads,
        "geometry.num_kv_heads": {shape[1] for shape in map(_shape, caches)},
        "geometry.head_dim": {shape[3] for shape in map(_shape, caches)},
        "geometry.hidden_size": _shape(embeds)[-1] if embeds is not None else None,
        "geometry.vocab_size": _shape(logits)[-1] if logits is not None else None,
        "precision.activations": _dtype_name(embeds) if embeds is not None else None,
        "precision.cache": {_dtype_name(value) for value in caches},
        "sparsity.output_text_keep_rate": names.KEEP in outputs,
    }


def _check_passes(folder: Path, manifest: Manifest) -> None:
    """Compare settings of the passes with those of the sparsity; both are in the manifest."""
    sparsity = manifest.sparsity
    expected = {
        _SELECTION: {"policy": sparsity.policy, "sparse_layer": sparsity.sparse_layer},
        _KEEP_BIT: {
            "policy": sparsity.text_policy,
            "keep_rate": sparsity.output_text_keep_rate,
        },
    }
    for graph, passes in manifest.passes.items():
        for entry in passes:
            said = expected.get(entry.get("name", ""), {})
            found = entry.get("parameters", {})
            for key, value in said.items():
                if key in found and found[key] != value:
                    where = f"the {entry['name']} of {graph}"
                    raise _contradiction(folder, f"sparsity: {key}", value, where, found[key])


def _check_embedding(folder: Path, manifest: Manifest, embedding: dict[str, Any]) -> None:
    """Compare the place of the embeddings with what the file or a graph says of it."""
    weights = manifest.precision.weights
    if embedding["dtype"] != weights.stored_name:
        raise _contradiction(
            folder, "embedding.dtype", embedding["dtype"], "precision.weights", weights.name
        )
    if embedding["shape"][1] != manifest.geometry.hidden_size:
        width = manifest.geometry.hidden_size
        raise _contradiction(
            folder, "embedding.shape", embedding["shape"], "the decoder", width
        )
    file = embedding["file"]
    place = (embedding["offset"], tuple(embedding["shape"]), embedding["dtype"])
    places = _places(folder, file)
    if place not in places:
        at_offset = [known for known in places if known[0] == embedding["offset"]]
        raise _contradiction(
            folder,
            "embedding.offset, shape and dtype",
            place,
            f"{layout.LLM_FOLDER}/{file}",
            at_offset or "no tensor that begins there",
        )


def _places(folder: Path, file: str) -> list[tuple[int, tuple[int, ...], str]]:
    """Return (offset, shape, dtype) of each tensor in a weights file that something describes."""
    import onnx

    path = folder / layout.LLM_FOLDER / file
    if path.suffix == ".safetensors":
        try:
            sources = safetensors_sources(path).values()
        except CheckpointError as error:
            raise BundleError(f"{error} It is part of the bundle {folder}.") from error
        stored = {known.numpy: known.stored_name for known in NUMBER_FORMATS.values()}
        return [
            (source.location.offset, source.shape, stored[source.dtype])
            for source in sources
            if source.location is not None
        ]
    dense = _graph(folder, f"{layout.LLM_FOLDER}/{layout.DENSE_DECODER}")
    by_dtype = {known.dtype_name: known.stored_name for known in NUMBER_FORMATS.values()}
    found = []
    for tensor in dense.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") == file:
            dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            place = int(entries.get("offset", 0)), tuple(tensor.dims)
            found.append((*place, by_dtype.get(dtype, dtype)))
    return found
