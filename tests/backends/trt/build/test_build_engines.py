from __future__ import annotations

import logging
import shutil
import sys
import types

import onnx
import pytest

from dllava_export.backends.trt.build import build_engines as module
from dllava_export.backends.trt.build.build_engines import build_engines
from dllava_export.backends.trt.build.build_options import BuildOptions
from dllava_export.backends.trt.engine_config import (
    bundle_digest,
    file_digest,
    read_engine_config,
)
from dllava_export.bundles.manifest import read_manifest, write_manifest
from dllava_export.errors import BackendError, BundleError, EngineBuildError
from dllava_export.passes.policies.registry import POLICIES

pytestmark = pytest.mark.slow

BACKEND = "tensorrt-rtx"
OPS = {"GatherLastToken", "GatherTokens", "KVCacheAttention", "PredictorHead", "SelectTokens"}


def copied(bundles, tmp_path, checkpoint, precision):
    """Return a bundle of the test's own: engines are written into it."""
    return shutil.copytree(bundles.path(checkpoint, precision), tmp_path / "bundle")


def plant_unknown_op(folder, graph):
    """Give the first MLP of a graph an op that no backend has."""
    path = folder / graph
    model = onnx.load(path, load_external_data=False)
    next(n for n in model.graph.node if n.op_type == "Sigmoid").op_type = "NoSuchOp"
    manifest = read_manifest(folder)
    path.unlink()
    onnx.save(model, path)
    write_manifest(folder, manifest)


def files(folder):
    return sorted(path.name for path in (folder / "engines").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def built(bundles, tmp_path_factory):
    """A float32 bundle with shared key heads, and the report of its build."""
    pytest.importorskip("tensorrt_rtx")
    folder = copied(bundles, tmp_path_factory.mktemp("fp32"), "gqa", "fp32")
    options = BuildOptions(
        BACKEND, max_batch_size=2, max_input_len=96, max_kv_cache_capacity=161
    )
    return folder, build_engines(folder, options)


@pytest.fixture(scope="module")
def without_recompute(bundles, tmp_path_factory):
    """A float16 bundle whose recompute graph has an op that no backend knows."""
    pytest.importorskip("tensorrt_rtx")
    folder = copied(bundles, tmp_path_factory.mktemp("fp16"), "mha", "fp16")
    plant_unknown_op(folder, "llm/recompute.onnx")
    return folder, build_engines(folder, BuildOptions(BACKEND, compute_capabilities=("8.9",)))


def test_builds_every_engine(built):
    folder, report = built
    assert files(folder) == [
        "config.json",
        "decoder.engine",
        "recompute.engine",
        "visual.engine",
    ]
    for name, engine in report.config.engines.items():
        path = report.folder / f"{name}.engine"
        assert (path.stat().st_size, file_digest(path)) == (engine.num_bytes, engine.sha256)
    assert [p.name for p in (folder / "engines").iterdir()] == [BACKEND]


def test_configuration_says_what_was_built(built):
    folder, report = built
    config = read_engine_config(folder, BACKEND)
    assert config == report.config
    assert (config.precision, config.max_batch_size, config.max_input_len) == ("fp32", 2, 96)
    assert (config.capacities["full"], config.not_built, config.is_stripped) == (
        161,
        {},
        False,
    )
    assert config.plugins == dict.fromkeys(sorted(OPS), "body")
    assert config.bundle_digest == bundle_digest(folder)
    assert config.backend_version == sys.modules["tensorrt_rtx"].__version__


def test_decoder_has_a_profile_for_prefill_and_one_for_decode(built):
    decoder = built[1].config.engines["decoder"]
    assert list(decoder.profiles) == ["prefill", "decode"]
    prefill, decode = decoder.profiles.values()
    assert prefill["inputs_embeds"].max == (2, 96, 64)
    assert decode["inputs_embeds"].max == (2, 1, 64)
    for name in ("num_kept", "num_image_rows"):
        assert prefill[name].is_values


@pytest.mark.parametrize("policy", POLICIES.names())
def test_every_policy_builds_in_half_precision(bundles, tmp_path, policy):
    pytest.importorskip("tensorrt_rtx", reason="engines are built with TensorRT-RTX")
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.path("gqa", "fp16", policy=policy), folder)
    report = build_engines(folder, BuildOptions(BACKEND, compute_capabilities=("8.9",)))
    assert files(folder)[1:] == ["decoder.engine", "recompute.engine", "visual.engine"]
    assert report.config.not_built == {}


def test_engines_leave_the_bundle_whole(built):
    assert str(read_manifest(built[0]).precision) == "fp32"


def test_text_of_the_report(built):
    text = built[1].to_text()
    assert "fp32, up to 2 samples of 96 rows; caches of 161 and " in text
    assert "profiles: prefill, decode" in text
    assert "none, all ops by their bodies" in text
    assert built[1].to_json()["config"]["backend"] == BACKEND


def test_says_which_engine_is_missing_and_why(without_recompute):
    folder, report = without_recompute
    assert files(folder) == ["config.json", "decoder.engine", "visual.engine"]
    reason = report.config.not_built["recompute"]
    assert "(NoSuchOp) at decoder layer 0, MLP: " in reason
    assert f"recompute  not built: {reason}" in report.to_text()
    assert report.config.compute_capabilities == ("8.9",)


def test_failed_build_leaves_earlier_engines(without_recompute):
    folder, _report = without_recompute
    before = {name: file_digest(folder / "engines" / BACKEND / name) for name in files(folder)}
    plant_unknown_op(folder, "llm/model.onnx")
    with pytest.raises(EngineBuildError, match=r"\(NoSuchOp\) at decoder layer 0, MLP"):
        build_engines(folder, BuildOptions(BACKEND))
    after = {name: file_digest(folder / "engines" / BACKEND / name) for name in files(folder)}
    assert after == before
    assert [p.name for p in (folder / "engines").iterdir()] == [BACKEND]


def test_bf16_bundle(bundles, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    folder = copied(bundles, tmp_path, "mha", "bf16")
    (folder / "llm" / "recompute.onnx").unlink()
    manifest = read_manifest(bundles.path("mha", "bf16"))
    manifest.tensors.pop("llm/recompute.onnx")
    write_manifest(folder, manifest)
    report = build_engines(folder, BuildOptions(BACKEND, max_input_len=64))
    assert list(report.config.engines) == ["decoder", "visual"]


def test_no_tensorrt(bundles, monkeypatch):
    folder = bundles.path("mha", "fp32")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="tensorrt cannot be imported"):
        build_engines(folder, BuildOptions("tensorrt"))
    assert not (folder / "engines").exists()


def test_build_that_does_not_fit_in_memory(bundles, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 20)
    with pytest.raises(
        EngineBuildError, match=r"needs about .* MiB of memory, and 1\.0 MiB are"
    ):
        build_engines(bundles.path("mha", "fp32"), BuildOptions(BACKEND))


def test_forced_build_does_not_ask_for_memory(bundles, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 20)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match="cannot be imported"):
        build_engines(bundles.path("mha", "fp32"), BuildOptions(BACKEND, force=True))


def test_folder_without_a_manifest(tmp_path):
    with pytest.raises(BundleError, match="expected a bundle"):
        build_engines(tmp_path, BuildOptions(BACKEND))


def test_graph_that_was_changed(bundles, tmp_path):
    folder = copied(bundles, tmp_path, "mha", "fp32")
    (folder / "llm" / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(BundleError, match=r"model\.onnx was changed after the bundle"):
        build_engines(folder, BuildOptions(BACKEND))


def test_corrupt_graph_that_the_manifest_lists(bundles, tmp_path):
    folder = copied(bundles, tmp_path, "mha", "fp32")
    manifest = read_manifest(folder)
    (folder / "llm" / "model.onnx").write_bytes(b"\xff not onnx")
    write_manifest(folder, manifest)
    with pytest.raises(BundleError, match="cannot be read as an ONNX model"):
        build_engines(folder, BuildOptions(BACKEND))


def test_plugins_that_cannot_be_had_leave_ops_to_their_bodies(caplog):
    too_old = types.SimpleNamespace(__name__="tensorrt", __version__="10.15")
    caplog.set_level(logging.INFO, "dllava_export")
    assert module._register_plugins(too_old) == ()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "There are no plugins: tensorrt 10.15 takes no plugins" in caplog.text
