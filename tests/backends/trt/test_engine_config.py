from __future__ import annotations

import json

import pytest

from dllava_export.backends.trt.engine_config import (
    EngineConfig,
    EngineFile,
    ProfileShapes,
    bundle_digest,
    engine_folder,
    file_digest,
    read_engine_config,
    write_engine_config,
)
from dllava_export.errors import BackendError, BundleError

BACKEND = "tensorrt-rtx"
SHAPES = {
    "position_ids": ProfileShapes((1, 1), (1, 60), (2, 100)),
    "num_kept": ProfileShapes((1,), (40,), (80,), is_values=True),
}
CONFIG = EngineConfig(
    backend=BACKEND,
    backend_version="1.7.1.116",
    compute_capabilities=("8.9",),
    precision="fp16",
    max_batch_size=2,
    max_input_len=100,
    capacities={"full": 201, "sparse": 140},
    is_stripped=False,
    engines={"decoder": EngineFile("decoder.engine", "ab" * 32, 12, {"prefill": SHAPES})},
    not_built={"recompute": "no kernel"},
    plugins={"SelectTokens": "body"},
    bundle_digest="cd" * 32,
    timing_cache=None,
    tool_versions={"onnx": "1.23"},
)


@pytest.fixture
def written(tmp_path):
    folder = engine_folder(tmp_path, BACKEND)
    folder.mkdir(parents=True)
    write_engine_config(folder, CONFIG)
    return tmp_path


def change(bundle_folder, edit):
    path = engine_folder(bundle_folder, BACKEND) / "config.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def write_manifest(folder, **files):
    document = {"files": {name: {"sha256": digest} for name, digest in files.items()}}
    (folder / "dllava_export.json").write_text(json.dumps(document))


def test_reads_what_was_written(written):
    assert read_engine_config(written, BACKEND) == CONFIG
    assert [path.name for path in engine_folder(written, BACKEND).iterdir()] == ["config.json"]


def as_0_1_wrote_it(document):
    capacities = document.pop("capacities")
    document["capacity_full"] = capacities["full"]
    document["capacity_sparse"] = capacities["sparse"]


def test_reads_what_0_1_wrote(written):
    change(written, as_0_1_wrote_it)
    assert read_engine_config(written, BACKEND) == CONFIG


def without_a_capacity(document):
    as_0_1_wrote_it(document)
    document.pop("capacity_full")


def test_no_engines(tmp_path):
    with pytest.raises(
        BackendError, match=r"has no engines for tensorrt: .* Build them: dllava"
    ):
        read_engine_config(tmp_path, "tensorrt")


def test_another_schema_version(written):
    change(written, lambda document: document.update(schema_version=7))
    with pytest.raises(
        BackendError, match="schema version 7; this dllava-export reads version 1"
    ):
        read_engine_config(written, BACKEND)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda d: d.pop("max_input_len"), id="field missing"),
        pytest.param(without_a_capacity, id="field of 0.1 missing"),
        pytest.param(lambda d: d.update(engines=3), id="wrong type"),
        pytest.param(lambda d: d["capacities"].update(full="3"), id="wrong type inside"),
        pytest.param(lambda d: d.update(is_stripped=None), id="null"),
        pytest.param(lambda d: d.pop("schema_version"), id="no version"),
    ],
)
def test_damaged_configuration(written, edit):
    change(written, edit)
    with pytest.raises(BackendError, match=r"is damaged.* Build the engines again"):
        read_engine_config(written, BACKEND)


def test_digest_follows_graphs_and_weights_alone(tmp_path):
    write_manifest(tmp_path, **{"llm/model.onnx": "a", "llm/tokenizer.json": "b"})
    before = bundle_digest(tmp_path)
    write_manifest(tmp_path, **{"llm/model.onnx": "a", "llm/tokenizer.json": "c"})
    assert bundle_digest(tmp_path) == before
    for name in ("llm/model.onnx", "llm/model.onnx.data", "llm/checkpoint.safetensors"):
        write_manifest(tmp_path, **{"llm/model.onnx": "a", name: "d"})
        assert bundle_digest(tmp_path) != before


def test_digest_of_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"cannot be read \(No such file"):
        bundle_digest(tmp_path)
    (tmp_path / "dllava_export.json").write_text("{}")
    with pytest.raises(BundleError, match="is damaged"):
        bundle_digest(tmp_path)


def test_digest_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x").startswith("ba7816bf8f01cfea")
