from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import checkpoint_factory as factory
import full_disk
import ml_dtypes
import numpy as np
import onnx
import pytest
from golden import DATA

from dllava_export.bundles import layout
from dllava_export.bundles.manifest import Manifest, read_manifest
from dllava_export.checkpoints.checkpoint import random_checkpoint, read_checkpoint
from dllava_export.errors import BundleError, UnsupportedModelError
from dllava_export.exporting import exporter as exporter_module
from dllava_export.exporting import tracing, weights
from dllava_export.exporting.exporter import export_checkpoint, resolve_sparsity
from dllava_export.exporting.options import SparsityOptions
from dllava_export.exporting.report import ExportReport
from dllava_export.geometry import Geometry, PredictorGeometry
from dllava_export.precision import Precision
from dllava_export.runtime.loading import load
from dllava_export.sparsity import DENSE, Sparsity

UNIFORM = SparsityOptions(policy="uniform", sparse_layer=1, image_keep_rate=0.5)
IDS = [1, -200, 5, 6]
SIZED_CONFIG = {
    **factory.ORIGINAL_CONFIG,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4000,
    "vision_config": factory.VISION_CONFIG,
}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def decoder_weights(folder: Path, name: str = layout.DENSE_DECODER) -> dict[str, np.ndarray]:
    """Read initializers; onnx refuses hard links, which ONNX Runtime reads."""
    copy = folder.with_name("copy")
    shutil.copytree(folder / "llm", copy, copy_function=shutil.copyfile, dirs_exist_ok=True)
    model = onnx.load(copy / name)
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


# What is written.


def test_writes_graphs_and_what_they_need(tmp_path, traced_once):
    shutil.copytree(DATA / "mha", tmp_path / "in")
    export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "out", link=True)
    assert files(tmp_path / "out") == {
        "dllava_export.json",
        "llm/checkpoint-model.safetensors",
        "llm/config.json",
        "llm/dense.onnx",
        "llm/model.onnx",
        "llm/predictors.onnx",
        "llm/recompute.onnx",
        "visual/checkpoint-model.safetensors",
        "visual/model.onnx",
        "visual/preprocessor_config.json",
    }


def test_writes_data_files_where_nothing_is_shared(tmp_path, traced_once, no_clones):
    factory.make_checkpoint(tmp_path / "in", "llava")
    export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "out", UNIFORM)
    assert files(tmp_path / "out") == {
        "dllava_export.json",
        "llm/config.json",
        "llm/dense.onnx",
        "llm/embedding.safetensors",
        "llm/model.onnx",
        "llm/model.onnx.data",
        "llm/recompute.onnx",
        "visual/model.onnx",
        "visual/model.onnx.data",
        "visual/preprocessor_config.json",
    }


def test_manifest_describes_the_checkpoint(bundles):
    manifest = read_manifest(bundles.path("gqa"))
    assert dataclasses.replace(
        manifest, tensors={}, passes={}, producer={}, source=""
    ) == Manifest(
        family="llava",
        layout="dynamic-llava",
        precision=Precision.of("fp32"),
        geometry=Geometry(5, 64, 144, 4, 2, 16, 131, 64, PredictorGeometry(32, 4, 64, 2)),
        max_position_embeddings=512,
        sparsity=Sparsity("predictor", 3, 0.29, None, 0.5),
        image_token_id=-200,
        image_aspect_ratio="pad",
        has_visual=True,
        embedding=manifest.embedding,
        chat_template=None,
        eos_token_ids=(2,),
        tensors={},
        passes={},
        producer={},
        source="",
    )


def test_manifest_lists_inputs_and_outputs(bundles):
    tensors = read_manifest(bundles.path("gqa")).tensors
    assert tensors.keys() == {
        "llm/dense.onnx", "llm/model.onnx", "llm/recompute.onnx", "visual/model.onnx",
    }  # fmt: skip
    assert tensors["llm/model.onnx"]["outputs"][0] == {
        "name": "logits",
        "dtype": "float32",
        "shape": ["batch", 131],
    }
    kept = {"name": "kept_lengths", "dtype": "int64", "shape": ["batch"]}
    assert kept in tensors["llm/model.onnx"]["inputs"]


def test_manifest_lists_passes_and_tools(bundles):
    manifest = read_manifest(bundles.path("gqa"))
    passes = {name: [p["name"] for p in done] for name, done in manifest.passes.items()}
    assert passes.keys() == {"model.onnx", "recompute.onnx"}
    assert passes["model.onnx"][-2:] == ["InsertImageSelectionPass", "InsertKeepBitPass"]
    assert manifest.passes["model.onnx"][-1]["parameters"]["policy"] == "predictor"
    assert manifest.producer.keys() == {
        "dllava-export", "torch", "transformers", "onnx", "onnxscript", "onnx-graphsurgeon",
    }  # fmt: skip


def test_copies_configuration_and_settings_of_the_image_processor(bundles):
    folder = bundles.path("gqa")
    stored = json.loads((folder / "llm/config.json").read_text())
    assert stored["model_type"] == "dynamic_llava_llama"
    processor = json.loads((folder / "visual/preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 112, "width": 112}


@pytest.mark.parametrize("name", ["llm/model.onnx", "llm/recompute.onnx", "visual/model.onnx"])
def test_graphs_are_valid(bundles, name):
    onnx.checker.check_model(bundles.path("gqa") / name, full_check=True)


def sized_checkpoint(folder: Path, dtype: str = "float32"):
    folder.mkdir()
    factory.write_json(folder / "config.json", {**SIZED_CONFIG, "torch_dtype": dtype})
    return random_checkpoint(folder / "config.json")


def decoder_bytes(checkpoint) -> int:
    return sum(
        source.num_bytes
        for name, source in checkpoint.tensors.items()
        if name.startswith(("model.", "lm_head."))
    )


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_weights_are_stored_once(tmp_path, traced_once):
    checkpoint = sized_checkpoint(tmp_path / "in")
    report = export_checkpoint(checkpoint, tmp_path / "out", UNIFORM)
    stored = folder_bytes(tmp_path / "out" / "llm")
    assert decoder_bytes(checkpoint) < stored <= 1.02 * decoder_bytes(checkpoint)
    assert report.bytes_linked == 0
    assert report.bytes_written == sum(
        (tmp_path / "out" / name).stat().st_size for name in files(tmp_path / "out")
    )


def test_weights_at_half_precision_take_half(tmp_path, traced_once):
    checkpoint = sized_checkpoint(tmp_path / "in")
    export_checkpoint(checkpoint, tmp_path / "out", UNIFORM, precision="fp16")
    assert folder_bytes(tmp_path / "out" / "llm") <= 1.02 * decoder_bytes(checkpoint) / 2


def test_linked_weights_take_no_space(tmp_path, traced_once):
    checkpoint = sized_checkpoint(tmp_path / "random")
    values = {name: source.read() for name, source in checkpoint.tensors.items()}
    folder = tmp_path / "in"
    folder.mkdir()
    factory.write_json(folder / "config.json", SIZED_CONFIG)
    factory.write_files(
        folder, {factory.stored_key(n, "llava"): v for n, v in values.items()}, "sharded"
    )
    report = export_checkpoint(read_checkpoint(folder), tmp_path / "out", UNIFORM, link=True)
    new = [tmp_path / "out" / name for name in files(tmp_path / "out")]
    new = [path for path in new if path.stat().st_nlink == 1]
    assert not {path.suffix for path in new} & {".safetensors", ".data"}
    assert report.bytes_written == sum(path.stat().st_size for path in new) < 500_000
    assert report.bytes_linked > 0.8 * decoder_bytes(checkpoint)


# The summary.


def report(
    bundles, warnings: tuple[str, ...] = (), shared: tuple[int, int] = (0, 0), **sparsity
) -> list[str]:
    manifest = read_manifest(bundles.path("gqa"))
    if sparsity:
        manifest = dataclasses.replace(manifest, sparsity=Sparsity(**sparsity))
    done = ExportReport(Path("out"), manifest, *shared, 1 << 20, 12.34, 3.21, warnings)
    return done.to_text().splitlines()


def test_summary_says_what_links_are_worth(bundles):
    first, *_, last = report(bundles, shared=(3 << 30, 0))
    assert first == "Wrote out in 12.3 s: 1.0 MiB new, weights linked (3.00 GiB)"
    assert last.startswith("warning: weights are hard links: onnx, netron, polygraphy and")


def test_summary_says_that_clones_take_no_space(bundles):
    first, *_, last = report(bundles, shared=(0, 3 << 30))
    assert first.endswith("1.0 MiB new, weights cloned (3.00 GiB that take no space)")
    assert "warning" not in last


def test_summary_says_what_was_written(bundles):
    assert report(bundles, warnings=("look out",)) == [
        "Wrote out in 12.3 s: 1.0 MiB new, weights copied in 3.2 s",
        "  decoder   5 layers, hidden 64, fp32",
        "  sparsity  predictor, from layer 3 on: 18 of 64 image tokens, "
        "generated text keep rate 0.5",
        "  graphs    llm/model.onnx, llm/recompute.onnx, visual/model.onnx",
        "warning: look out",
    ]


@pytest.mark.parametrize(
    ("sparsity", "line"),
    [
        pytest.param({"policy": "none", "output_text_keep_rate": 1.0},
                     "none (dense decoder)", id="dense"),
        pytest.param({"policy": "norm", "image_keep_tokens": 7, "output_text_keep_rate": 1},
                     "norm, from layer 2 on: 7 of 64 image tokens, all generated text kept",
                     id="image only"),
    ],
)  # fmt: skip
def test_summary_says_what_is_pruned(bundles, sparsity, line):
    assert report(bundles, **sparsity)[2] == f"  sparsity  {line}"


def test_warns_where_there_is_no_tokenizer(tmp_path, traced_once):
    factory.make_checkpoint(tmp_path / "in", "llava")
    done = export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "out", UNIFORM)
    (warning,) = done.warnings
    assert warning.endswith("in has no tokenizer: the bundle takes and returns token ids "
                            "(`run --input-ids`).")  # fmt: skip


# Precisions and cuts.


@pytest.mark.parametrize(
    ("stored", "asked", "precision", "dtype"),
    [
        pytest.param(np.float32, None, "fp32", np.float32, id="fp32 by default"),
        pytest.param(np.float32, "fp16", "fp16", np.float16, id="fp32 to fp16"),
        pytest.param(np.float16, None, "fp16", np.float16, id="fp16 by default"),
        pytest.param(np.float16, "fp32", "fp32", np.float32, id="fp16 to fp32"),
        pytest.param(ml_dtypes.bfloat16, None, "fp16", np.float16, id="bf16 becomes fp16"),
        pytest.param(ml_dtypes.bfloat16, "bf16", "bf16", ml_dtypes.bfloat16, id="bf16"),
    ],
)
def test_converts_weights(tmp_path, traced_once, stored, asked, precision, dtype):
    values = factory.make_checkpoint(tmp_path / "in", dtype=stored)
    source = read_checkpoint(tmp_path / "in")
    done = export_checkpoint(source, tmp_path / "out", precision=asked)
    assert done.manifest.precision == Precision.of(precision)
    assert done.manifest.precision.weights.numpy == dtype
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.norm.weight"):
        found = decoder_weights(tmp_path / "out")[name]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values[name].astype(dtype))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_predictors_compute_in_float32(tmp_path, traced_once, precision):
    factory.make_checkpoint(tmp_path / "in", dtype=np.float16)
    export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "out", precision=precision)
    stored = decoder_weights(tmp_path / "out", layout.PREDICTORS)
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float16)}
    model = onnx.load(tmp_path / "out" / "llm" / layout.DECODER, load_external_data=False)
    scores = [v for v in model.graph.value_info if v.name.endswith("scores")]
    assert scores
    assert {v.type.tensor_type.elem_type for v in scores} == {onnx.TensorProto.FLOAT}


def test_refuses_an_unknown_precision(tmp_path):
    factory.make_checkpoint(tmp_path / "in")
    with pytest.raises(ValueError, match=r"one of fp32, fp16, bf16, got 'int8'\."):
        export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "out", precision="int8")
    assert not (tmp_path / "out").exists()


def test_exports_the_first_layers_only(tmp_path, traced_once):
    factory.make_checkpoint(tmp_path / "in")
    source = read_checkpoint(tmp_path / "in", num_decoder_layers=2)
    done = export_checkpoint(source, tmp_path / "out", UNIFORM, precision="fp16")
    assert done.manifest.geometry.num_layers == 2
    layers = {n.split(".")[2] for n in decoder_weights(tmp_path / "out") if ".layers." in n}
    assert layers == {"0", "1"}
    assert run(tmp_path / "out").cache_lengths.shape == (2, 1)


# Every layout.


def run(folder: Path):
    """Prefill with an image and feed one token; return the decode step's result."""
    session = load(folder, num_threads=1)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 28, 28)).astype(np.float32)
    kept = session.prefill([IDS], pixels).kept_image_indices
    assert kept.tolist() == [[1, 3]]  # evenly spaced: 2 of 4
    return session.decode([7])


@pytest.fixture(scope="module")
def logits_by_weights():
    """Logits by a digest of the weights: layouts that hold the same must give the same."""
    return {}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        pytest.param("llava", {}, id="llava"),
        pytest.param("llava", {"tower": "folder"}, id="llava, tower in a folder"),
        pytest.param("llava", {"files": "sharded"}, id="llava, sharded"),
        pytest.param("llava", {"files": "bin"}, id="llava, bin"),
        pytest.param("llava", {"files": "sharded bin"}, id="llava, sharded bin"),
        pytest.param("llava", {"pad": 3}, id="llava, unaligned"),
        pytest.param("dynamic-llava", {}, id="dynamic-llava"),
        pytest.param("dynamic-llava", {"files": "bin"}, id="dynamic-llava, bin"),
        pytest.param("llava-hf", {}, id="llava-hf"),
        pytest.param("llava-hf", {"files": "sharded"}, id="llava-hf, sharded"),
        pytest.param("llava-hf new", {}, id="llava-hf, new names"),
    ],
)
def test_every_layout_runs(tmp_path, traced_once, logits_by_weights, layout, options):
    values = factory.make_checkpoint(tmp_path / "in", layout, **options)
    done = export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "out", UNIFORM)
    assert done.manifest.layout == layout.split(" ")[0]
    step = run(tmp_path / "out")
    assert step.cache_lengths[:, 0].tolist()[0] == len(IDS) - 1 + 4 + 1
    data = b"".join(values[n].tobytes() for n in sorted(values) if "predictor" not in n)
    known = logits_by_weights.setdefault(hashlib.sha256(data).hexdigest(), step.logits)
    np.testing.assert_array_equal(step.logits, known)


def test_layouts_were_compared_with_each_other(logits_by_weights):
    assert len(logits_by_weights) <= 2


def test_random_weights_run(tmp_path, traced_once):
    factory.write_json(
        tmp_path / "tiny.json",
        {**factory.TEXT_CONFIG, "model_type": "llama", "vision_config": factory.VISION_CONFIG},
    )
    factory.write_json(tmp_path / "config.json", {"model_type": "another"})
    done = export_checkpoint(
        random_checkpoint(tmp_path / "tiny.json"), tmp_path / "out", UNIFORM
    )
    assert done.bytes_linked == 0
    assert run(tmp_path / "out").logits.shape == (1, factory.VOCAB)
    stored = json.loads((tmp_path / "out" / "llm" / "config.json").read_text())
    assert stored["model_type"] == "llama"


# Settings.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Read checkpoints: trained, without predictors, without the output-text predictor."""
    folder = tmp_path_factory.mktemp("checkpoints")
    changes = {"sparse_config": {**factory.SPARSE_CONFIG, "use_output_text_predictor": False}}
    factory.make_checkpoint(folder / "trained")
    factory.make_checkpoint(folder / "plain", "llava")
    factory.make_checkpoint(folder / "image only", changes=changes)
    return {path.name: read_checkpoint(path) for path in folder.iterdir()}


def resolved(checkpoint, **options) -> Sparsity:
    return resolve_sparsity(
        SparsityOptions(**options),
        checkpoint,
        num_layers=checkpoint.spec.text_config.num_hidden_layers,
    )


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        pytest.param("trained", {}, Sparsity("predictor", 1, 0.5, None, 0.5),
                     id="as trained"),
        pytest.param("trained", {"image_keep_rate": 0.25}, Sparsity("predictor", 1, 0.25),
                     id="another rate"),
        pytest.param("trained", {"image_keep_tokens": 3}, Sparsity("predictor", 1, 0.5, 3),
                     id="a number of tokens"),
        pytest.param("trained", {"output_text_keep_rate": 1.0},
                     Sparsity("predictor", 1, 0.5, None, 1.0), id="all text"),
        pytest.param("trained", {"policy": "uniform", "sparse_layer": 2},
                     Sparsity("uniform", 2, 0.5), id="another policy, as trained"),
        pytest.param("trained", {"policy": "norm"}, Sparsity("norm", 1, 0.5, None, 1.0),
                     id="norm keeps all text"),
        pytest.param("trained", {"policy": "none"}, DENSE, id="dense"),
        pytest.param("trained", {"policy": "none", "output_text_policy": "none",
                                 "output_text_keep_rate": 1.0}, DENSE, id="dense, all text"),
        pytest.param("trained", {"policy": "dart"}, Sparsity("dart", 1, 0.5, None, 1.0),
                     id="dart keeps all text"),
        pytest.param("trained", {"policy": "dart", "output_text_policy": "predictor"},
                     Sparsity("dart", 1, 0.5, None, 0.5, "predictor"),
                     id="trained text behind another image policy"),
        pytest.param("trained", {"output_text_policy": "none"},
                     Sparsity("predictor", 1, 0.5, None, 1.0), id="no decision about text"),
        pytest.param("trained", {"policy": "norm", "output_text_policy": "uniform"},
                     Sparsity("norm", 1, 0.5, None, 0.5, "uniform"), id="two policies"),
        pytest.param("trained", {"policy": "uniform", "output_text_policy": "predictor"},
                     Sparsity("uniform", 1, 0.5, None, 0.5, "predictor"), id="trained text"),
        pytest.param("plain", {"policy": "norm", "output_text_policy": "uniform",
                               "output_text_keep_rate": 0.3, "image_keep_tokens": 1},
                     Sparsity("norm", 2, 0.2, 1, 0.3, "uniform"), id="two without training"),
        pytest.param("image only", {"output_text_policy": "random"},
                     Sparsity("predictor", 1, 0.5, None, 0.5, "random"),
                     id="a policy in place of the text predictor"),
        pytest.param("image only", {}, Sparsity("predictor", 1, 0.5, None, 1.0),
                     id="no text predictor keeps all text"),
        pytest.param("plain", {"policy": "random", "image_keep_rate": 0.3},
                     Sparsity("random", 2, 0.3), id="plain"),
        pytest.param("plain", {"policy": "uniform", "image_keep_tokens": 1},
                     Sparsity("uniform", 2, 0.2, 1, 0.5), id="plain, a number of tokens"),
    ],
)  # fmt: skip
def test_fills_in_what_was_left_open(checkpoints, name, options, expected):
    assert resolved(checkpoints[name], **options) == expected


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        pytest.param("plain", {}, UnsupportedModelError,
                     "plain is a llava checkpoint without an image predictor, which policy "
                     "'predictor' needs.*--policy attention, .*, uniform, or none",
                     id="no predictors"),
        pytest.param("image only", {"output_text_keep_rate": 0.5}, UnsupportedModelError,
                     r"without an output-text predictor, but .* 0\.5 .* Use 1\.0, or an output-t",
                     id="no text predictor"),
        pytest.param("plain", {"policy": "norm", "output_text_policy": "predictor",
                               "image_keep_tokens": 1}, UnsupportedModelError,
                     "plain is a llava checkpoint without an output-text predictor",
                     id="no text predictor for another policy"),
        pytest.param("trained", {"output_text_policy": "norm"}, ValueError,
                     "policy 'norm' ranks image tokens", id="no text policy"),
        pytest.param("trained", {"output_text_policy": "unifrom"}, ValueError,
                     "got 'unifrom'. Did you mean 'uniform'", id="unknown text policy"),
        pytest.param("trained", {"sparse_layer": 3}, ValueError,
                     r"sparse_layer must be in 1\.\.2 for 3 decoder layers, got 3\.",
                     id="layer above"),
        pytest.param("trained", {"sparse_layer": 0}, ValueError,
                     r"sparse_layer must be at least 1, got 0", id="layer below"),
        pytest.param("trained", {"image_keep_rate": 0.2}, ValueError,
                     "0 of 4 image tokens would be kept", id="nothing kept"),
        pytest.param("trained", {"image_keep_tokens": 5}, ValueError,
                     "5 of 4 image tokens would be kept", id="more than there are"),
        pytest.param("trained", {"image_keep_rate": float("nan")}, ValueError,
                     "image_keep_rate must be a finite number, got nan", id="not a number"),
        pytest.param("trained", {"output_text_keep_rate": 1.5}, ValueError,
                     r"output_text_keep_rate must be in \(0, 1\], got 1\.5\.", id="above 1"),
        pytest.param("trained", {"policy": "norm", "output_text_keep_rate": 0.5}, ValueError,
                     "policy 'norm' ranks image tokens", id="norm and text"),
        pytest.param("trained", {"output_text_policy": "none", "output_text_keep_rate": 0.5},
                     ValueError, r"output_text_policy is 'none', .*keep_rate is 0\.5\. Use",
                     id="none and a rate"),
        pytest.param("trained", {"policy": "none", "output_text_policy": "uniform"}, ValueError,
                     "policy 'none' makes a dense decoder, .* but output_text_policy is "
                     "'uniform'. Leave it out, or use an image policy: attention, dart",
                     id="text policy of a dense decoder"),
        pytest.param("trained", {"policy": "none", "output_text_keep_rate": 0.5}, ValueError,
                     r"makes a dense decoder, .* but output_text_keep_rate is 0\.5\. Leave",
                     id="text rate of a dense decoder"),
        pytest.param("trained", {"policy": "best"}, ValueError,
                     "policy must be one of attention, .*, uniform, none, got 'best'",
                     id="unknown policy"),
    ],
)  # fmt: skip
def test_refuses_settings(checkpoints, name, options, error, message):
    with pytest.raises(error, match=message):
        resolved(checkpoints[name], **options)


def test_a_cut_below_the_sparse_layer_is_refused(tmp_path):
    factory.make_checkpoint(tmp_path / "in")
    source = read_checkpoint(tmp_path / "in", num_decoder_layers=1)
    with pytest.raises(ValueError, match="sparse_layer must be"):
        export_checkpoint(source, tmp_path / "out")


# Interruptions.


@pytest.mark.parametrize(
    ("owner", "function"),
    [
        pytest.param(tracing, "trace_visual", id="tracing"),
        pytest.param(weights, "attach_weights", id="weights"),
        pytest.param(weights, "write_embedding", id="embedding"),
        pytest.param(exporter_module, "write_manifest", id="manifest"),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_export_leaves_nothing(
    tmp_path, traced_once, monkeypatch, owner, function, error
):
    def interrupted(*_, **__):
        raise error

    factory.make_checkpoint(tmp_path / "in")
    monkeypatch.setattr(owner, function, interrupted)
    with pytest.raises(error):
        export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_leaves_nothing(tmp_path, traced_once, monkeypatch):
    factory.make_checkpoint(tmp_path / "in")
    full_disk.fill_up(monkeypatch)
    with pytest.raises(BundleError, match=r"could not be written: .*No space left on device"):
        export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_same_export_gives_the_same_bytes(tmp_path):
    factory.make_checkpoint(tmp_path / "in")
    source = read_checkpoint(tmp_path / "in")
    for name in ("first", "second"):
        export_checkpoint(source, tmp_path / name)
    first, second = tmp_path / "first", tmp_path / "second"
    assert files(first) == files(second)
    for name in files(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_bundle_inside_its_checkpoint_is_refused_before_the_work(tmp_path):
    factory.make_checkpoint(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=r"in/out lies in .*in, which it is made from"):
        export_checkpoint(read_checkpoint(tmp_path / "in"), tmp_path / "in" / "out")
    assert sorted(tmp_path.rglob("*")) == before
