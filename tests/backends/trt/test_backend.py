from __future__ import annotations

import shutil

import numpy as np
import pytest
from engine_folders import add_engines

from dllava_export.backends.trt.engine import LoadedEngine
from dllava_export.backends.trt.engine_config import EngineFile, ProfileShapes, engine_folder
from dllava_export.backends.trt.trt_module import trt_logger, trt_module
from dllava_export.errors import BackendError
from dllava_export.runtime.loading import load

RTX = "tensorrt-rtx"


def rtx():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return trt_module(RTX)


def needs_no_gpu():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is missing")
    error, count = runtime.cudaGetDeviceCount()
    if not int(error) and count:
        pytest.skip("there is an NVIDIA GPU")


@pytest.fixture
def folder(bundles, tmp_path):
    """A real bundle of the test's own, without engines."""
    return shutil.copytree(bundles.path("mha"), tmp_path / "bundle")


def tiny_engine(trt):
    """Return [num_bytes] uint8, an engine that adds its input to itself; this needs no GPU."""
    log = trt_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (4,))
    y = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
    network.mark_output(y)
    blob = builder.build_serialized_network(network, builder.create_builder_config())
    return np.frombuffer(blob, np.uint8)


def test_says_how_to_build_engines(folder):
    rtx()
    with pytest.raises(BackendError, match=f"dllava-export build {folder} --backend {RTX}"):
        load(folder, RTX)


def test_refuses_a_damaged_engine_before_it_asks_for_a_gpu(folder):
    add_engines(folder, backend_version=rtx().__version__)
    (engine_folder(folder, RTX) / "decoder.engine").write_bytes(b"decoder Engine")
    with pytest.raises(BackendError, match=r"decoder\.engine is damaged"):
        load(folder, RTX)


def test_refuses_engines_of_another_version(folder):
    rtx()
    add_engines(folder, backend_version="1.0.0.0")
    with pytest.raises(
        BackendError, match=r"built by tensorrt-rtx 1\.0\.0\.0; .* is installed"
    ):
        load(folder, RTX)


def test_says_so_where_there_is_no_gpu(folder):
    needs_no_gpu()
    add_engines(folder, backend_version=rtx().__version__)
    with pytest.raises(BackendError, match="No NVIDIA GPU can be used here"):
        load(folder, RTX)


def test_says_how_to_install_tensorrt(folder):
    with pytest.raises(BackendError, match=r"tensorrt.* Install it: pip install"):
        try:
            trt_module("tensorrt")
        except BackendError:
            load(folder, "tensorrt")
        else:
            pytest.skip("TensorRT is installed")


def test_a_provider_belongs_to_onnx_runtime(folder):
    with pytest.raises(BackendError, match=r"provider 'cuda' was given with .*'tensorrt-rtx'"):
        load(folder, RTX, provider="cuda")


def test_an_engine_that_this_machine_cannot_run_is_refused():
    needs_no_gpu()
    trt = rtx()
    blob = tiny_engine(trt)
    ranges = {"decode": {"x": ProfileShapes((4,), (4,), (4,))}}
    entry = EngineFile("tiny.engine", "", len(blob), ranges)
    with pytest.raises(
        BackendError,
        match=r"cannot run tiny\.engine on this GPU .*cudaError.* Build the engines",
    ):
        LoadedEngine(trt, trt_logger(trt), blob, "decoder", entry)
