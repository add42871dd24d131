from __future__ import annotations

import dataclasses
import json
import shutil

import onnx
import pytest

from dllava_export.bundles.graph_facts import check_graphs
from dllava_export.bundles.layout import MANIFEST
from dllava_export.bundles.manifest import read_manifest, write_manifest
from dllava_export.errors import BundleError
from dllava_export.runtime.loading import load


@pytest.fixture
def folder(bundles, tmp_path):
    """A bundle of the test's own."""
    return shutil.copytree(bundles.path("mha"), tmp_path / "out")


def refused(folder, message):
    for verify in (True, "full"):
        with pytest.raises(BundleError, match=message + ".*Export the bundle again"):
            load(folder, verify=verify)


@pytest.mark.parametrize("sparsity", [{}, {"policy": "none"}, {"output_text_keep_rate": 1.0}])
@pytest.mark.parametrize("checkpoint", ["mha", "gqa"])
def test_bundles_agree_with_their_manifests(bundles, checkpoint, sparsity):
    folder = bundles.path(checkpoint, **sparsity)
    check_graphs(folder, read_manifest(folder, verify="full"))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("geometry", {"num_layers": 5}, "geometry.num_layers 5, llm/model.onnx has 4"),
        ("geometry", {"num_heads": 8}, r"geometry.num_heads \{8\}, llm/model.onnx has \{4\}"),
        ("geometry", {"num_kv_heads": 2}, r"geometry.num_kv_heads \{2\}, .* has \{4\}"),
        ("geometry", {"head_dim": 8}, r"geometry.head_dim \{8\}, .* has \{16\}"),
        ("geometry", {"hidden_size": 32}, "geometry.hidden_size 32, .* has 64"),
        ("geometry", {"vocab_size": 130}, "geometry.vocab_size 130, .* has 131"),
        ("geometry", {"num_image_tokens": 35}, "geometry.num_image_tokens 35, .* has 36"),
        ("precision", {"cache": "fp16"}, r"precision.cache \{'float16'\}, .*'float32'"),
        ("precision", {"activations": "fp16"}, "precision.activations float16, .* float32"),
        ("precision", {"weights": "fp16"}, "embedding.dtype F32, precision.weights has fp16"),
        ("sparsity", {"sparse_layer": 1}, r"sparsity.sparse_layer \[1, 2, 3\], .* \[2, 3\]"),
        ("sparsity", {"policy": "none"}, r"sparsity.sparse_layer \[\], .* has \[2, 3\]"),
        ("sparsity", {"output_text_keep_rate": 1.0}, "output_text_keep_rate False, .* True"),
        ("sparsity", {"output_text_keep_rate": 0.4}, "sparsity: keep_rate 0.4, the InsertKee"),
        ("sparsity", {"policy": "uniform"}, "sparsity: policy uniform, the InsertImageSel"),
        ("embedding", {"offset": 92}, "embedding.offset, shape and dtype .* no tensor that"),
        ("embedding", {"shape": [130, 64]}, r"embedding.offset, shape .* has .*\(131, 64\)"),
        ("embedding", {"shape": [131, 32]}, "embedding.shape .*, the decoder has 64"),
    ],
)
def test_a_manifest_that_contradicts_the_graphs_is_refused(folder, part, changes, message):
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    document[part] |= changes
    path.write_text(json.dumps(document))
    refused(folder, message)


def test_inputs_and_outputs_are_compared(folder):
    manifest = read_manifest(folder)
    tensors = json.loads(json.dumps(manifest.tensors))
    tensors["llm/recompute.onnx"]["inputs"][0]["dtype"] = "float16"
    write_manifest(folder, dataclasses.replace(manifest, tensors=tensors))
    refused(
        folder, r"tensors.llm/recompute.onnx.inputs \{.*'float16'.*, llm/recompute.onnx has"
    )


@pytest.mark.parametrize("name", ["llm/model.onnx", "visual/model.onnx"])
def test_graphs_must_be_listed(folder, name):
    manifest = read_manifest(folder)
    tensors = {key: value for key, value in manifest.tensors.items() if key != name}
    write_manifest(folder, dataclasses.replace(manifest, tensors=tensors))
    refused(folder, f"says tensors .*, {name} has part of every such bundle")


def test_a_graph_that_is_none(folder):
    manifest = read_manifest(folder)
    (folder / "llm/model.onnx").write_bytes(b"no graph")
    write_manifest(folder, manifest)
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read \(.*Copy the whole"):
        load(folder)


@pytest.mark.parametrize("name", ["llm/model.onnx", "visual/model.onnx"])
@pytest.mark.parametrize("damage", ["no shapes", "no type", "no outputs"])
def test_graphs_that_lack_what_is_compared(folder, name, damage):
    manifest = read_manifest(folder)
    model = onnx.load(folder / name, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if damage == "no shapes":
            value.type.tensor_type.ClearField("shape")
        if damage == "no type":
            value.ClearField("type")
    if damage == "no outputs":
        del model.graph.output[:]
    (folder / name).write_bytes(model.SerializeToString())
    write_manifest(folder, manifest)
    with pytest.raises(BundleError, match="Export the bundle again"):
        load(folder)
    if damage == "no shapes":  # and the manifest says the same
        tensors = json.loads(json.dumps(manifest.tensors))
        for entry in (*tensors[name]["inputs"], *tensors[name]["outputs"]):
            entry["shape"] = []
        write_manifest(folder, dataclasses.replace(manifest, tensors=tensors))
        with pytest.raises(BundleError, match=r"lacks inputs, outputs or sizes .* Export the"):
            load(folder)


def test_another_graph_under_the_same_manifest(folder, bundles):
    manifest = read_manifest(folder)
    other = bundles.path("mha", policy="uniform", sparse_layer=3)
    shutil.copyfile(other / "llm/model.onnx", folder / "llm/model.onnx")
    write_manifest(folder, manifest)
    refused(folder, "tensors.llm/model.onnx.inputs .*'capacity_sparse'.*'capacity_full'")


def test_embeddings_of_another_exporters_decoder(folder):
    """They are an initializer of the dense graph, in a file without a header."""
    manifest = read_manifest(folder)
    assert manifest.embedding is not None
    (folder / "llm" / "e.data").write_bytes(bytes(manifest.embedding["offset"] + 131 * 64 * 4))
    dense = onnx.load(folder / "llm/dense.onnx", load_external_data=False)
    tensor = dense.graph.initializer.add(name="table", data_type=1, dims=[131, 64])
    tensor.data_location = tensor.EXTERNAL
    for key, value in {"location": "e.data", "offset": "88", "length": "33536"}.items():
        tensor.external_data.add(key=key, value=value)
    (folder / "llm/dense.onnx").write_bytes(dense.SerializeToString())
    for offset, is_there in ((88, True), (92, False)):
        place = {**manifest.embedding, "file": "e.data", "offset": offset}
        write_manifest(folder, dataclasses.replace(manifest, embedding=place))
        if is_there:
            check_graphs(folder, read_manifest(folder))
        else:
            refused(folder, "embedding.offset, shape and dtype .* no tensor that begins there")
