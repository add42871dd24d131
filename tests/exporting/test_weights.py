from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint_factory as factory
import full_disk
import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from dllava_export.bundles.bundle_writer import BundleWriter
from dllava_export.bundles.embedding import EmbeddingTable
from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.checkpoints.tensor_source import TensorSource
from dllava_export.errors import BundleError, CheckpointError, InvalidInputError
from dllava_export.exporting.weights import (
    CHECKPOINT_LOCATION,
    attach_weights,
    reference_tensor,
    write_embedding,
    write_safetensors,
)

NAME = "model.layers.0.mlp.gate_proj.weight"  # [40, 16]: above 1 KiB in every precision
SMALL = "model.norm.weight"  # [16]


def make_model(*initializers: TensorProto) -> onnx.ModelProto:
    """Return a model with one output per initializer, each cast to float32."""
    nodes, outputs = [], []
    for tensor in initializers:
        output = f"{tensor.name}/float32"
        nodes.append(helper.make_node("Cast", [tensor.name], [output], to=TensorProto.FLOAT))
        outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, tensor.dims))
    graph = helper.make_graph(nodes, "graph", [], outputs, list(initializers))
    opset = [helper.make_opsetid("", 24)]
    return helper.make_model(graph, opset_imports=opset, ir_version=11)


def run_saved(model: onnx.ModelProto, path: Path) -> list[np.ndarray]:
    onnx.save(model, path)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {})


def tiny(folder: Path, **options: object) -> dict[str, TensorSource]:
    factory.make_checkpoint(folder, **options)  # type: ignore[arg-type]
    return read_checkpoint(folder).tensors


def output_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "llm"
    folder.mkdir()
    return folder


def external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_references_survive_graphsurgeon(tmp_path: Path) -> None:
    source = tiny(tmp_path / "in")[NAME]
    model = make_model(reference_tensor("weight", source, source_name=NAME))
    graph = gs.import_onnx(model)
    graph.tensors()["weight"].name = "renamed"
    graph.toposort().cleanup()
    tensor = gs.export_onnx(graph).graph.initializer[0]
    assert tensor.name == "renamed"
    assert tensor.data_location == TensorProto.EXTERNAL
    assert external(tensor) == {"location": CHECKPOINT_LOCATION, "source": NAME}
    assert not tensor.HasField("raw_data")


@pytest.mark.parametrize("pad", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_links_files_of_the_same_type(tmp_path: Path, pad: int, dtype: type) -> None:
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in", pad=pad, dtype=dtype, files="sharded")
    names = [NAME, "lm_head.weight", "model.embed_tokens.weight"]
    model = make_model(*(reference_tensor(name, sources[name]) for name in names))
    report = attach_weights(
        {"decoder": model}, folder, sources, writer=BundleWriter(link=True)
    )
    assert report.bytes_shared == sum(sources[name].num_bytes for name in names)
    assert report.bytes_written == 0
    assert {path.name for path in folder.iterdir()} == set(report.files)
    for name in report.files:
        assert (folder / name).samefile(tmp_path / "in" / name.removeprefix("checkpoint-"))
    for name, value in zip(names, run_saved(model, folder / "model.onnx"), strict=True):
        np.testing.assert_array_equal(value, sources[name].read().astype(np.float32))


def test_links_the_file_behind_a_symbolic_link(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    tiny(tmp_path / "cache")
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "cache").iterdir():
        (tmp_path / "in" / path.name).symlink_to(path)
    sources = read_checkpoint(tmp_path / "in").tensors
    model = make_model(reference_tensor(NAME, sources[NAME]))
    writer = BundleWriter(link=True)
    (file,) = attach_weights({"decoder": model}, folder, sources, writer=writer).files
    assert not (folder / file).is_symlink()
    (value,) = run_saved(model, folder / "model.onnx")
    np.testing.assert_array_equal(value, sources[NAME].read())


def test_files_of_the_same_name_do_not_clash(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    first, second = tiny(tmp_path / "a")[NAME], tiny(tmp_path / "b", dtype=np.float16)[NAME]
    sources = {"first": first, "second": second}
    model = make_model(*(reference_tensor(name, sources[name]) for name in sources))
    report = attach_weights(
        {"decoder": model}, folder, sources, writer=BundleWriter(link=True)
    )
    assert report.files == ("checkpoint-model.safetensors", "checkpoint-2-model.safetensors")
    for source, value in zip(
        sources.values(), run_saved(model, folder / "model.onnx"), strict=True
    ):
        np.testing.assert_array_equal(value, source.read().astype(np.float32))


def test_links_again_into_the_same_folder(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in")
    reports = [
        attach_weights(
            {"m": make_model(reference_tensor(NAME, sources[NAME]))},
            folder,
            sources,
            writer=BundleWriter(link=True),
        )
        for _ in range(2)
    ]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("files", ["single", "bin"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.usefixtures("no_clones")
def test_streams_and_converts(tmp_path: Path, files: str, stored: type, wanted: type) -> None:
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in", files=files, dtype=stored)
    names = [NAME, "lm_head.weight"]
    dtype = np.dtype(wanted)
    model = make_model(*(reference_tensor(n, sources[n], dtype=dtype) for n in names))
    report = attach_weights({"decoder": model}, folder, sources)
    num_values = sum(sources[name].num_values for name in names)
    assert report.bytes_inlined == 0
    assert report.bytes_written == num_values * dtype.itemsize
    assert report.files == ("model.onnx.data",)
    for name, value in zip(names, run_saved(model, folder / "model.onnx"), strict=True):
        expected = sources[name].read().astype(np.float32).astype(wanted).astype(np.float32)
        np.testing.assert_array_equal(value, expected)


@pytest.mark.usefixtures("no_clones")
def test_falls_back_to_copying_where_links_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in")
    model = make_model(reference_tensor(NAME, sources[NAME]))
    assert attach_weights(
        {"decoder": model}, folder, sources, writer=BundleWriter(link=True)
    ).files == ("model.onnx.data",)
    (value,) = run_saved(model, folder / "model.onnx")
    np.testing.assert_array_equal(value, sources[NAME].read())


@pytest.mark.usefixtures("no_clones")
def test_models_share_one_copy_of_a_tensor(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in")
    models = {
        "decoder": make_model(reference_tensor("a", sources[NAME], source_name=NAME)),
        "recompute": make_model(reference_tensor(NAME, sources[NAME])),
    }
    report = attach_weights(models, folder, sources)
    assert report.bytes_written == sources[NAME].num_bytes
    assert (folder / "model.onnx.data").stat().st_size == sources[NAME].num_bytes
    tensors = [model.graph.initializer[0] for model in models.values()]
    assert external(tensors[0]) == external(tensors[1])
    assert external(tensors[0]) == {
        "location": "model.onnx.data",
        "offset": "0",
        "length": str(sources[NAME].num_bytes),
    }


def test_small_tensors_and_constants_are_inline(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in")
    constant = onnx.numpy_helper.from_array(np.arange(3, dtype=np.float32), "constant")
    model = make_model(reference_tensor(SMALL, sources[SMALL]), constant)
    report = attach_weights({"decoder": model}, folder, sources)
    assert report.bytes_inlined == sources[SMALL].num_bytes
    assert report.files == ()
    assert not list(folder.iterdir())
    small, numbers = run_saved(model, folder / "model.onnx")
    np.testing.assert_array_equal(small, sources[SMALL].read())
    np.testing.assert_array_equal(numbers, [0, 1, 2])


def test_offsets_are_aligned(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    file = tmp_path / "config.json"
    big = {"vocab_size": 20_000, "vision_config": factory.VISION_CONFIG}
    factory.write_json(file, {**factory.ORIGINAL_CONFIG, **big})
    sources = weights_of_random(file)
    names = [NAME, "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    model = make_model(*(reference_tensor(name, sources[name]) for name in names))
    attach_weights({"decoder": model}, folder, sources)
    offsets = [int(external(tensor)["offset"]) for tensor in model.graph.initializer]
    assert offsets == [0, 4096, 4096 + 20_000 * 16 * 4]
    assert offsets[2] % 64 == 0


def weights_of_random(file: Path) -> dict[str, TensorSource]:
    from dllava_export.checkpoints.checkpoint import random_checkpoint

    return random_checkpoint(file).tensors


@pytest.mark.usefixtures("no_clones")
def test_references_in_subgraphs_are_found(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in")
    branch = make_model(reference_tensor(NAME, sources[NAME])).graph
    other = onnx.GraphProto()
    other.CopyFrom(branch)
    node = helper.make_node("If", ["flag"], ["out"], then_branch=branch, else_branch=other)
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [40, 16])
    model = helper.make_model(helper.make_graph([node], "graph", [flag], [out]))
    attach_weights({"decoder": model}, folder, sources)
    for attribute in model.graph.node[0].attribute:
        assert external(attribute.g.initializer[0])["location"] == "model.onnx.data"


def test_source_that_does_not_exist(tmp_path: Path) -> None:
    sources = tiny(tmp_path)
    model = make_model(reference_tensor("x", sources[NAME], source_name="absent"))
    with pytest.raises(
        CheckpointError, match="'x' of decoder refers to 'absent', expected one"
    ):
        attach_weights({"decoder": model}, tmp_path, sources)


def test_source_of_another_shape(tmp_path: Path) -> None:
    model = make_model(reference_tensor(NAME, (np.dtype(np.float32), (2, 2))))
    with pytest.raises(
        CheckpointError, match=r"is \[2, 2\], .* is \[40, 16\], expected the sa"
    ):
        attach_weights({"decoder": model}, tmp_path, tiny(tmp_path / "in"))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_overflow_in_fp16_names_the_tensor(tmp_path: Path, dtype: type) -> None:
    values = factory.make_checkpoint(tmp_path, dtype=dtype)
    values["lm_head.weight"][1, 2] = 1e6
    stored = {factory.stored_key(n, "dynamic-llava"): value for n, value in values.items()}
    factory.write_files(tmp_path, stored)
    sources = read_checkpoint(tmp_path).tensors
    name = "lm_head.weight"
    model = make_model(reference_tensor(name, sources[name], dtype=np.dtype(np.float16)))
    with pytest.raises(
        CheckpointError,
        match=r"'lm_head.weight' has the value \S+, expected at most 65504 for float16",
    ):
        attach_weights({"decoder": model}, tmp_path, sources)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("no_clones")
def test_full_disk_names_the_file_and_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in")
    full_disk.fill_up(monkeypatch)
    model = make_model(reference_tensor(NAME, sources[NAME]))
    with pytest.raises(
        BundleError, match=r"model\.onnx\.data could not be written: .*No space left on device"
    ):
        attach_weights({"decoder": model}, folder, sources)
    assert not list(folder.iterdir())


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    sources = tiny(tmp_path / "in")
    with pytest.raises(BundleError, match=r"could not be written: .*No such file"):
        write_embedding(tmp_path / "absent", sources[NAME], np.dtype(np.float16))


@pytest.mark.usefixtures("no_clones")
def test_never_writes_through_a_hard_link(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    os.link(precious, folder / "model.onnx.data")
    sources = tiny(tmp_path / "in")
    model = make_model(reference_tensor(NAME, sources[NAME]))
    attach_weights({"decoder": model}, folder, sources)
    assert precious.read_text() == "keep me"


@pytest.mark.usefixtures("no_clones")
def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = output_folder(tmp_path)
    sources = tiny(tmp_path / "in")
    model = make_model(reference_tensor(NAME, sources[NAME]))
    attach_weights({"decoder": model}, folder, sources, writer=BundleWriter(progress=True))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "model.onnx.data: 100%" in captured.err


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.usefixtures("no_clones")
def test_embedding_table(tmp_path: Path, link: bool, pad: int, dtype: type) -> None:
    folder = output_folder(tmp_path)
    source = tiny(tmp_path / "in", dtype=dtype, pad=pad)["model.embed_tokens.weight"]
    reference = write_embedding(
        folder, source, np.dtype(dtype), writer=BundleWriter(link=link)
    )
    reference = json.loads(json.dumps(reference))  # it goes into the manifest
    expected_file = "checkpoint-model.safetensors" if link else "embedding.safetensors"
    assert reference["file"] == expected_file
    assert reference["shape"] == [factory.VOCAB, factory.HIDDEN]
    table = EmbeddingTable(folder, reference)
    ids = np.array([[0, 39, 7]])
    rows = table.lookup(ids)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, source.read()[ids])
    assert table.lookup(ids, np.dtype(np.float32)).dtype == np.float32
    assert table.lookup(np.zeros((1, 0), np.int64)).shape == (1, 0, factory.HIDDEN)


def test_embedding_is_converted(tmp_path: Path) -> None:
    folder = output_folder(tmp_path)
    source = tiny(tmp_path / "in")["model.embed_tokens.weight"]
    reference = write_embedding(folder, source, np.dtype(np.float16))
    (stored,) = load_file(folder / "embedding.safetensors").items()
    assert stored[0] == "embedding"
    np.testing.assert_array_equal(stored[1], source.read().astype(np.float16))
    np.testing.assert_array_equal(EmbeddingTable(folder, reference).rows, stored[1])


@pytest.mark.parametrize("bad", [-200, 40])
def test_lookup_outside_the_vocabulary(tmp_path: Path, bad: int) -> None:
    source = tiny(tmp_path / "in")["model.embed_tokens.weight"]
    table = EmbeddingTable(tmp_path, write_embedding(tmp_path, source, source.dtype))
    with pytest.raises(InvalidInputError, match=rf"the first is {bad}; expected 0\.\.39"):
        table.lookup(np.array([1, bad]))


def test_embedding_file_that_is_missing_or_short(tmp_path: Path) -> None:
    reference = {"file": "x", "offset": 8, "dtype": "F16", "shape": [4, 2]}
    with pytest.raises(
        BundleError, match="x is missing, expected token embeddings up to byte 24"
    ):
        EmbeddingTable(tmp_path, reference)
    (tmp_path / "x").write_bytes(bytes(10))
    with pytest.raises(BundleError, match="x has 10 bytes, expected token embeddings"):
        EmbeddingTable(tmp_path, reference)


def test_written_safetensors_can_be_loaded(tmp_path: Path) -> None:
    sources = tiny(tmp_path / "in")
    chosen = {name: (sources[name], np.dtype(np.float32)) for name in (SMALL, NAME)}
    offsets = write_safetensors(tmp_path / "some.safetensors", chosen)
    loaded = load_file(tmp_path / "some.safetensors")
    for name in chosen:
        np.testing.assert_array_equal(loaded[name], sources[name].read())
        mapped = np.memmap(
            tmp_path / "some.safetensors", np.float32, "r", offsets[name], loaded[name].shape
        )
        np.testing.assert_array_equal(mapped, loaded[name])


@pytest.mark.slow
def test_streaming_7b_tensors_needs_little_memory(tmp_path: Path) -> None:
    factory.make_sparse_7b(tmp_path / "in", num_layers=3)
    program = """
import resource, sys
from pathlib import Path
import ml_dtypes
import numpy as np
from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.exporting.weights import write_embedding
folder = Path(sys.argv[1])
source = read_checkpoint(folder / "in").tensors["model.embed_tokens.weight"]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_embedding(folder, source, np.dtype("bfloat16"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "embedding.safetensors").stat().st_size > 260_000_000
    assert int(result.stdout) < 150  # MiB; the tensor has 250, and 500 as float32
