from __future__ import annotations

import logging
import sys
import types

import pytest

from dllava_export.backends.trt.trt_module import (
    TENSORRT_BACKENDS,
    target_compute_capabilities,
    trt_logger,
    trt_module,
)
from dllava_export.errors import BackendError

EXTRAS = {"tensorrt": "trt", "tensorrt-rtx": "trt-rtx"}
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def test_unknown_backend():
    with pytest.raises(BackendError, match="no TensorRT backend 'onnx'; expected tensorrt or"):
        trt_module("onnx")


@pytest.mark.parametrize("backend", TENSORRT_BACKENDS)
def test_not_installed(monkeypatch, backend):
    monkeypatch.setitem(sys.modules, MODULES[backend], None)
    install = rf'Install it: pip install "dllava-export\[{EXTRAS[backend]}\]"'
    with pytest.raises(
        BackendError, match=f"{MODULES[backend]} cannot be imported.*{install}"
    ):
        trt_module(backend)


@pytest.mark.parametrize(
    ("backend", "version", "expected"),
    [
        ("tensorrt", "10.14.1", "10.15"),
        ("tensorrt", "9.3", "10.15"),
        ("tensorrt-rtx", "1.3.0.35", "1.4"),
        ("tensorrt", "unknown", "10.15"),
    ],
)
def test_version_that_is_too_old(monkeypatch, backend, version, expected):
    module = types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, MODULES[backend], module)
    with pytest.raises(BackendError, match=f"{version}, expected {expected} or later"):
        trt_module(backend)


@pytest.mark.parametrize("version", ["10.15.0.1", "11.0"])
def test_version_that_will_do(monkeypatch, version):
    module = types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert trt_module("tensorrt") is module


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def test_targets_of_tensorrt_rtx(rtx):
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(target_compute_capabilities(rtx))


def test_logger_forwards_and_remembers_errors(rtx, caplog):
    caplog.set_level(logging.DEBUG, "dllava_export")
    listener = trt_logger(rtx)
    listener.log(rtx.ILogger.WARNING, "a note")
    listener.log(rtx.ILogger.ERROR, "a failure")
    listener.log(rtx.ILogger.INTERNAL_ERROR, "a defect")
    assert listener.errors == ["a failure", "a defect"]
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("DEBUG", "a note"),
        ("INFO", "a failure"),
        ("INFO", "a defect"),
    ]
