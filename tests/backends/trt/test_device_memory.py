from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from dllava_export.backends.trt.device_memory import CudaDevice, PinnedBuffer
from dllava_export.errors import BackendError


def num_gpus():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is missing")
    error, count = runtime.cudaGetDeviceCount()
    return 0 if int(error) else count


@pytest.fixture
def device():
    if not num_gpus():
        pytest.skip("there is no NVIDIA GPU")
    return CudaDevice()


def test_says_so_where_there_is_no_gpu():
    if num_gpus():
        pytest.skip("there is an NVIDIA GPU")
    with pytest.raises(
        BackendError, match=r"No NVIDIA GPU can be used here: cudaError\w+ \(.+--backend onnx"
    ):
        CudaDevice()


def test_says_so_where_cuda_python_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"cuda-python cannot be imported .* pip install"):
        CudaDevice()


def test_pinned_memory_is_seen_as_an_array_and_freed_with_its_owner():
    memory = np.zeros(64, np.uint8)
    freed = []
    runtime = types.SimpleNamespace(cudaFreeHost=freed.append)
    buffer = PinnedBuffer(runtime, memory.ctypes.data, 16)
    buffer.array[...] = 3
    assert memory.tolist() == [3] * 16 + [0] * 48
    del buffer
    assert freed == [memory.ctypes.data]


def capturing_runtime(calls, end_error=0):
    """Return CUDA's functions for a capture; each notes its name."""

    def function(name, *result):
        return lambda *_: calls.append(name) or result

    return types.SimpleNamespace(
        cudaStreamCaptureMode=types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        cudaStreamBeginCapture=function("begin", 0),
        cudaStreamEndCapture=function("end", runtime_error(end_error), None),
        cudaGetLastError=function("clear", 0),
        cudaGetErrorString=function("describe", 0, b"capture invalidated"),
    )


def runtime_error(code):
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is missing")
    return runtime.cudaError_t(code)


def device_of(runtime):
    device = CudaDevice.__new__(CudaDevice)
    device.runtime, device.stream = runtime, 7
    return device


@pytest.mark.parametrize("error", [BackendError, KeyboardInterrupt])
def test_a_capture_is_ended_and_its_error_cleared_whatever_stops_it(error):
    def stop():
        raise error

    calls = []
    with pytest.raises(error):
        device_of(capturing_runtime(calls)).capture(stop)
    assert calls == ["begin", "end", "clear"]


def test_an_error_of_cuda_is_not_left_for_tensorrt_to_find():
    calls = []
    device = device_of(capturing_runtime(calls, end_error=901))
    with pytest.raises(
        BackendError,
        match=r"cudaStreamEndCapture failed: cudaErrorStreamCaptureInvalidated \(capture inv",
    ):
        device.capture(lambda: None)
    assert calls == ["begin", "end", "clear", "describe"]


@pytest.mark.gpu
def test_there_is_no_gpu_of_that_number(device):
    with pytest.raises(BackendError, match=r"There is no GPU 99: CUDA sees \d+"):
        CudaDevice(99)


@pytest.mark.gpu
def test_memory_is_zeroed_and_copied_both_ways(device):
    buffer = device.allocate(1024, "a test")
    assert buffer.address % 256 == 0
    assert not device.read(buffer.address, (1024,), np.dtype(np.uint8)).any()
    pinned = device.allocate_pinned(1024)
    pinned.array[...] = np.arange(1024) % 251
    device.copy(buffer.address, pinned.array.ctypes.data, 1024)
    values = device.read(buffer.address, (1024,), np.dtype(np.uint8))
    assert np.array_equal(values, pinned.array)


@pytest.mark.gpu
def test_says_how_much_memory_is_free(device):
    with pytest.raises(
        BackendError, match=r"could not allocate .* MiB for the KV cache .* free"
    ):
        device.allocate(1 << 50, "the KV cache")


@pytest.mark.gpu
def test_a_captured_copy_runs_when_it_is_launched(device):
    source, target = device.allocate(256, "a test"), device.allocate(256, "a test")
    pinned = device.allocate_pinned(256)
    graph = device.capture(lambda: device.copy(target.address, source.address, 256))
    pinned.array[...] = 9
    device.copy(source.address, pinned.array.ctypes.data, 256)
    assert not device.read(target.address, (256,), np.dtype(np.uint8)).any()
    graph.launch()
    assert (device.read(target.address, (256,), np.dtype(np.uint8)) == 9).all()


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_stream_usable(device):
    def fail():
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        device.capture(fail)
    assert device.allocate(256, "a test").num_bytes == 256
