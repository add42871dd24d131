from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dllava_export.bundles.layout import MANIFEST
from dllava_export.bundles.manifest import (
    SCHEMA_VERSION,
    Manifest,
    read_manifest,
    write_manifest,
)
from dllava_export.errors import BundleError, SettingError
from dllava_export.geometry import Geometry, PredictorGeometry
from dllava_export.precision import BF16, FP16, FP32, Precision
from dllava_export.sparsity import DENSE, Sparsity


def make_manifest(predictor: PredictorGeometry | None = None) -> Manifest:
    return Manifest(
        family="llava",
        layout="dynamic-llava",
        precision=Precision.of("fp16"),
        geometry=Geometry(4, 64, 144, 4, 2, 16, 131, 36, predictor),
        max_position_embeddings=512,
        sparsity=Sparsity(policy="uniform", image_keep_tokens=7),
        image_token_id=-200,
        image_aspect_ratio="pad",
        has_visual=True,
        embedding={"file": "e.safetensors", "offset": 8, "dtype": "F16", "shape": [131, 64]},
        chat_template=None,
        eos_token_ids=(2, 5),
        tensors={},
        passes={"model.onnx": [{"name": "P", "parameters": {}, "modified": True}]},
        producer={"dllava-export": "0"},
        source="somewhere",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of two small files."""
    result = tmp_path / "out"
    (result / "llm").mkdir(parents=True)
    (result / "llm" / "model.onnx").write_bytes(b"graph")
    (result / "llm" / "model.onnx.data").write_bytes(bytes(range(200)) * 100)
    write_manifest(result, make_manifest())
    return result


def change_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    values = {**values, **changes}
    values = {k: v for k, v in values.items() if v is not None or k not in changes}
    path.write_text(json.dumps(values))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The manifest.


@pytest.mark.parametrize(
    "predictor",
    [pytest.param(None, id="no predictor"), pytest.param(PredictorGeometry(), id="predictor")],
)
def test_reads_what_was_written(folder, predictor):
    manifest = make_manifest(predictor)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_keeps_parts_of_the_precision_apart(folder):
    mixed = Precision(weights=FP16, activations=FP32, cache=BF16)
    manifest = dataclasses.replace(make_manifest(), precision=mixed, family=None)
    write_manifest(folder, manifest)
    document = json.loads((folder / MANIFEST).read_text())
    parts = {"weights": "fp16", "activations": "fp32", "cache": "bf16"}
    assert (document["precision"], document["family"]) == (parts, None)
    assert read_manifest(folder) == manifest


# What 0.1 wrote for `make_manifest(PREDICTOR)`.
PREDICTOR = PredictorGeometry(d_model=64, nhead=4, dim_feedforward=96, num_layers=1)
SCHEMA_1 = """{
  "schema_version": 1,
  "layout": "dynamic-llava",
  "precision": "fp16",
  "geometry": {
    "num_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "num_image_tokens": 36,
    "bytes_per_value": 2,
    "predictor": {
      "d_model": 64,
      "nhead": 4,
      "dim_feedforward": 96,
      "num_layers": 1
    }
  },
  "max_position_embeddings": 512,
  "sparsity": {
    "policy": "uniform",
    "sparse_layer": 2,
    "image_keep_rate": 0.2,
    "image_keep_tokens": 7,
    "output_text_keep_rate": 0.5
  },
  "image_token_id": -200,
  "image_aspect_ratio": "pad",
  "has_visual": true,
  "embedding": {
    "file": "e.safetensors",
    "offset": 8,
    "dtype": "F16",
    "shape": [
      131,
      64
    ]
  },
  "chat_template": null,
  "eos_token_ids": [
    2,
    5
  ],
  "tensors": {},
  "passes": {
    "model.onnx": [
      {
        "name": "P",
        "parameters": {},
        "modified": true
      }
    ]
  },
  "producer": {
    "dllava-export": "0"
  },
  "source": "somewhere",
  "files": {
    "llm/model.onnx": {
      "size": 5,
      "sha256": "eef93e1d14482804277fca0172464032d1a4fdbcc338524059fa1e861454ad4d"
    },
    "llm/model.onnx.data": {
      "size": 20000,
      "sha256": "752082773c71a6969283a296c06b0d52e933fb37d9f009485fdffbdc3f022e9c"
    }
  }
}
"""


def write_schema_1(folder: Path, **changes: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(json.loads(SCHEMA_1) | changes))


def test_reads_what_0_1_wrote(folder):
    (folder / MANIFEST).write_text(SCHEMA_1)
    assert read_manifest(folder) == make_manifest(PREDICTOR)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_reads_every_precision_of_0_1(folder, precision):
    write_schema_1(folder, precision=precision)
    assert read_manifest(folder).precision == Precision.of(precision)


def test_a_bare_decoder_of_0_1_has_no_family(folder):
    write_schema_1(folder, layout="onnx")
    assert read_manifest(folder) == dataclasses.replace(
        make_manifest(PREDICTOR), layout="onnx", family=None
    )


def test_a_dense_bundle_of_0_1_is_dense(folder):
    settings = json.loads(SCHEMA_1)["sparsity"]
    write_schema_1(folder, sparsity={**settings, "policy": "none", "image_keep_tokens": None})
    assert read_manifest(folder).sparsity == DENSE


def test_files_of_0_1_are_compared_too(folder):
    (folder / MANIFEST).write_text(SCHEMA_1)
    (folder / "llm" / "model.onnx").write_bytes(b"grapH")
    with pytest.raises(BundleError, match=r"model\.onnx was changed .* other contents"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"precision": "int8"}, id="unknown precision"),
        pytest.param({"geometry": {"predictor": None}}, id="incomplete geometry"),
        pytest.param({"family": "llava", "unknown": 1}, id="unknown key"),
    ],
)
def test_reports_a_damaged_manifest_of_0_1(folder, changes):
    write_schema_1(folder, **changes)
    with pytest.raises(BundleError, match=r"is damaged"):
        read_manifest(folder)


def test_lists_every_other_file(folder):
    document = json.loads((folder / MANIFEST).read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert {name: entry["size"] for name, entry in document["files"].items()} == {
        "llm/model.onnx": 5,
        "llm/model.onnx.data": 20000,
    }


def test_leaves_no_temporary_file_beside_the_manifest(folder):
    assert names_in(folder) == [MANIFEST, "llm"]


def test_files_that_nobody_reads_may_be_added(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "llm" / ".DS_Store").write_text("a file manager's")
    assert read_manifest(folder) == make_manifest()


@pytest.mark.parametrize("verify", [True, False, "full"])
@pytest.mark.parametrize(
    "name",
    [
        "llm/generation_config.json",
        "llm/tokenizer.json",
        "llm/additional_chat_templates/rag.jinja",
        "visual/preprocessor_config.json",
    ],
)
def test_refuses_files_that_were_added_where_they_would_be_read(folder, name, verify):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(BundleError, match=rf"{name} is not among the files .* Remove it, or"):
        read_manifest(folder, verify=verify)


def test_an_empty_list_of_files_turns_nothing_off(folder):
    change_manifest(folder, files={})
    with pytest.raises(BundleError, match=r"llm/model\.onnx is not among the files"):
        read_manifest(folder)


@pytest.mark.parametrize("verify", ["quick", 2, None])
def test_there_are_three_verifications(folder, verify):
    with pytest.raises(SettingError, match="verify must be True, False or 'full', got"):
        read_manifest(folder, verify=verify)


def test_only_the_full_check_sees_every_byte_of_large_files(folder):
    large = folder / "llm" / "model.onnx.data"
    with large.open("wb") as file:
        file.truncate(300 << 20)
    write_manifest(folder, make_manifest())
    assert read_manifest(folder, verify="full") == make_manifest()
    with large.open("r+b") as file:
        file.seek(3 << 20)
        file.write(bytes([1]) * (1 << 20))
    assert read_manifest(folder) == make_manifest()
    with pytest.raises(BundleError, match=r"model\.onnx\.data was changed .* other contents"):
        read_manifest(folder, verify="full")
    large.unlink()


def test_reports_a_folder_without_manifest(tmp_path):
    message = f"{tmp_path} has no {MANIFEST}; expected a bundle. Make one with"
    with pytest.raises(BundleError, match=message):
        read_manifest(tmp_path)


def test_reports_a_path_that_is_no_folder(tmp_path):
    with pytest.raises(BundleError, match=r"nothing is not a folder; expected a bundle"):
        read_manifest(tmp_path / "nothing")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"schema_version": 1, ', id="truncated"),
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="not an object"),
        pytest.param(b"{}", id="no schema version"),
        pytest.param(b'{"schema_version": 1}', id="no files"),
        pytest.param(b'{"schema_version": "one", "files": {}}', id="version of no number"),
        pytest.param(b'{"schema_version": 1, "files": {}}', id="no geometry"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
    ],
)
def test_reports_a_damaged_manifest(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(
        BundleError, match=rf"{MANIFEST} is damaged.*\. Export the bundle again"
    ):
        read_manifest(folder)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"unknown": 1}, id="unknown key"),
        pytest.param({"passes": None}, id="missing key"),
        pytest.param({"sparsity": {"policy": "norm"}}, id="a policy that decides nothing"),
        pytest.param({"geometry": {"predictor": None}}, id="incomplete geometry"),
        pytest.param({"files": {"../secret": {"size": 1, "sha256": ""}}}, id="file outside"),
        pytest.param(
            {"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, id="file elsewhere"
        ),
        pytest.param({"files": {"llm/model.onnx": {}}}, id="file without size"),
        pytest.param({"files": ["llm/model.onnx"]}, id="files as a list"),
        pytest.param({"eos_token_ids": 2}, id="number in place of a list"),
        pytest.param({"precision": "fp16"}, id="precision of schema 1"),
        pytest.param({"precision": {"weights": "fp16"}}, id="incomplete precision"),
        pytest.param(
            {"precision": {"weights": "fp16", "activations": "int8", "cache": "fp16"}},
            id="unknown format",
        ),
    ],
)
def test_reports_a_manifest_with_wrong_values(folder, changes):
    change_manifest(folder, **changes)
    with pytest.raises(BundleError, match=r"is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"max_position_embeddings": "512"}, "max_position_embeddings is '512', exp"
                     "ected a whole number", id="text"),
        pytest.param({"max_position_embeddings": 0}, "max_position_embeddings is 0, expected at "
                     "least 1", id="no size"),
        pytest.param({"has_visual": 1}, "has_visual is 1, expected true or false", id="flag"),
        pytest.param({"eos_token_ids": [2, True]}, "eos_token_ids is .*, expected a list of who",
                     id="true for a number"),
        pytest.param({"sparsity": {"sparse_layer": 2.0}}, "sparsity.sparse_layer is 2.0, expect"
                     "ed a whole number", id="float"),
        pytest.param({"passes": {"other.onnx": []}}, "passes is .* an entry for model.onnx",
                     id="no passes of the decoder"),
        pytest.param({"passes": {"model.onnx": [1]}}, "passes.model.onnx.0 is 1, expected a pas",
                     id="pass"),
        pytest.param({"tensors": {"../x.onnx": {}}}, r"files is '\.\./x.onnx', expected a file in",
                     id="graph outside"),
    ],
)  # fmt: skip
def test_says_which_value_is_wrong(folder, changes, message):
    change_manifest(folder, **changes)
    with pytest.raises(
        BundleError, match=rf"{MANIFEST} is damaged: {message}.*Export the bun"
    ):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"file": "../e"}, r"file is '\.\./e', expected a name", id="folder"),
        pytest.param({"offset": -8}, "offset is -8, expected at least 0", id="offset"),
        pytest.param({"offset": 8.0}, "offset is 8.0, expected a whole number", id="float"),
        pytest.param({"dtype": "I8"}, "dtype is 'I8', expected F32, F16, BF16", id="dtype"),
        pytest.param({"shape": [131]}, r"shape is \[131\], expected two sizes", id="rank"),
        pytest.param({"shape": [131, 0]}, "shape is 0, expected at least 1", id="nothing"),
    ],
)
def test_says_what_is_wrong_about_the_embedding(folder, changes, message):
    change_manifest(folder, embedding={**make_manifest().embedding, **changes})
    with pytest.raises(BundleError, match=rf"is damaged: embedding\.{message}"):
        read_manifest(folder)


@pytest.mark.parametrize("version", ["1", "2", 1.9, 2.0, True, None, [2]])
def test_a_schema_version_is_a_whole_number(folder, version):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    with pytest.raises(BundleError, match=r"schema_version is .*, expected a whole number"):
        read_manifest(folder)


def test_refuses_a_key_that_stands_twice(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text().replace("{", '{"source": "another",', 1))
    with pytest.raises(BundleError, match="the key 'source' stands twice"):
        read_manifest(folder)


def test_a_policy_need_not_be_installed(folder):
    written = dataclasses.replace(make_manifest(), sparsity=Sparsity(policy="mine"))
    write_manifest(folder, written)
    assert read_manifest(folder) == written


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        pytest.param(3, "Update dllava-export", id="newer"),
        pytest.param(0, "Export it again", id="older"),
    ],
)
def test_reports_another_schema_version(folder, version, remedy):
    change_manifest(folder, schema_version=version)
    message = (
        rf"schema version {version}; this dllava-export reads versions 1 to 2\. {remedy}\."
    )
    with pytest.raises(BundleError, match=message):
        read_manifest(folder)


# The files.


def test_reports_a_missing_file(folder):
    (folder / "llm" / "model.onnx").unlink()
    with pytest.raises(
        BundleError, match=r"out lacks llm/model\.onnx\. Copy the whole bundle"
    ):
        read_manifest(folder)


def test_reports_another_size(folder):
    (folder / "llm" / "model.onnx").write_bytes(b"graph!")
    message = r"model\.onnx was changed .* it has 6 bytes, the manifest says 5 bytes"
    with pytest.raises(BundleError, match=message):
        read_manifest(folder, verify=False)


def test_reports_other_contents_of_the_same_size(folder):
    (folder / "llm" / "model.onnx").write_bytes(b"grapf")
    message = r"it has other contents, the manifest says 5 bytes, digest \w{12}….*Export again"
    with pytest.raises(BundleError, match=message):
        read_manifest(folder)


def test_takes_contents_for_granted_without_verification(folder):
    (folder / "llm" / "model.onnx").write_bytes(b"grapf")
    assert read_manifest(folder, verify=False) == make_manifest()
