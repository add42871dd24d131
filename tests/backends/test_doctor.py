from __future__ import annotations

import json
import platform
import sys
import types

import pytest
from distributions import installed

from dllava_export.backends import doctor
from dllava_export.backends.gpus import Gpu
from dllava_export.backends.registry import BACKENDS
from dllava_export.backends.trt import factory
from dllava_export.errors import BackendError


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: ())


def backends(report):
    return {backend.name: backend for backend in report.backends}


def test_finds_this_python_and_its_packages(no_gpu):
    report = doctor.collect()
    assert report.python == platform.python_version()
    assert report.packages["numpy"] == sys.modules["numpy"].__version__
    assert report.gpus == ()


def test_onnxruntime_runs_bundles_here(no_gpu):
    pytest.importorskip("onnxruntime")
    status = backends(doctor.collect())["onnxruntime"]
    assert status.can_run
    assert "CPUExecutionProvider" in status.providers
    assert status.summary.startswith("runs bundles on the CPU")


def stand_in(monkeypatch, backend, outcome):
    """Let `trt_module` of one backend return a module or raise an error."""

    def trt_module(name):
        if name == backend and not isinstance(outcome, Exception):
            return outcome
        raise outcome if name == backend else BackendError("not this one")

    monkeypatch.setattr(factory, "trt_module", trt_module)


RTX = types.SimpleNamespace(
    ComputeCapability=types.SimpleNamespace(__members__=["NONE", "CURRENT", "SM75", "SM120"])
)


def gpu(compute_capability):
    return (Gpu("GPU", 1024, None, compute_capability),)


def test_tensorrt_rtx_here(no_gpu):
    pytest.importorskip("tensorrt_rtx")
    status = backends(doctor.collect())["tensorrt-rtx"]
    assert (status.can_build, status.can_run) == (True, False)
    assert status.summary == (
        "builds engines, runs none: that needs an NVIDIA GPU, and none is there"
    )


@pytest.mark.parametrize(
    ("gpus", "can_run", "summary"),
    [
        ((), False, "builds engines, runs none: that needs an NVIDIA GPU, and none is there"),
        (
            gpu("9.0"),
            False,
            "builds engines, runs none: compute capability 9.0 is none of 7.5, 12.0",
        ),
        (gpu("12.0"), True, "builds engines and runs them"),
    ],
)
def test_tensorrt_rtx_by_gpu(monkeypatch, gpus, can_run, summary):
    stand_in(monkeypatch, "tensorrt-rtx", RTX)
    status = BACKENDS.get("tensorrt-rtx").status(gpus)
    assert (status.can_build, status.can_run, status.summary) == (True, can_run, summary)


@pytest.mark.parametrize(
    ("gpus", "usable", "summary"),
    [
        ((), False, "neither builds engines nor runs them: both need an NVIDIA GPU"),
        (gpu("9.0"), True, "builds engines, with plugins, and runs them"),
    ],
)
def test_tensorrt_by_gpu(monkeypatch, gpus, usable, summary):
    stand_in(monkeypatch, "tensorrt", types.SimpleNamespace())
    status = BACKENDS.get("tensorrt").status(gpus)
    assert (status.can_build, status.can_run) == (usable, usable)
    assert status.summary.startswith(summary)


@pytest.mark.parametrize(
    ("backend", "extra"), [("tensorrt-rtx", "trt-rtx"), ("tensorrt", "trt")]
)
def test_tensorrt_that_does_not_work(no_gpu, monkeypatch, backend, extra):
    stand_in(monkeypatch, backend, BackendError("The Python module has no library."))
    installed(monkeypatch, **{"tensorrt_rtx_cu13": "1.7", "tensorrt_cu13_bindings": "11.4"})
    status = backends(doctor.collect())[backend]
    assert (status.can_build, status.can_run) == (False, False)
    assert status.summary == "The Python module has no library."
    assert status.install == f'pip install "dllava-export[{extra}]"'


def test_nothing_installed(no_gpu, monkeypatch):
    installed(monkeypatch)
    report = doctor.collect()
    assert set(report.packages.values()) == {None}
    status = backends(report)["onnxruntime"]
    assert (status.can_run, status.summary) == (False, "bundles cannot run")
    assert "to install: pip install onnxruntime" in report.to_text()
    assert 'to install: pip install "dllava-export[trt-rtx]"' in report.to_text()


def test_tensorrt_that_is_not_installed(no_gpu, monkeypatch):
    installed(monkeypatch)
    stand_in(monkeypatch, "tensorrt-rtx", BackendError("cannot be imported"))
    found = backends(doctor.collect())
    for name in ("tensorrt", "tensorrt-rtx"):
        assert found[name].summary == "engines can be neither built nor run"


def test_onnxruntime_that_cannot_be_imported(no_gpu, monkeypatch):
    installed(monkeypatch, onnxruntime="1.2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status = backends(doctor.collect())["onnxruntime"]
    assert not status.can_run
    assert status.summary.startswith(
        "installed, but cannot be imported: import of onnxruntime"
    )


@pytest.mark.parametrize(
    ("providers", "has_gpu", "summary"),
    [
        (["CPUExecutionProvider"], True, "runs bundles on the CPU"),
        (["CUDAExecutionProvider"], True, "CUDA is built in and a GPU is there"),
        (["CUDAExecutionProvider"], False, "CUDA is built in, but no GPU is there"),
    ],
)
def test_onnxruntime_with_and_without_cuda(monkeypatch, providers, has_gpu, summary):
    module = types.SimpleNamespace(get_available_providers=lambda: providers)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    status = BACKENDS.get("onnxruntime").status(gpu("8.9") if has_gpu else ())
    assert status.summary.endswith(summary)


def test_tells_the_gpus(monkeypatch):
    found = (Gpu("NVIDIA H100 80GB HBM3", 81559, "580.1", "9.0"), Gpu("RTX", 0, None, "8.9"))
    monkeypatch.setattr(doctor, "find_gpus", lambda: found)
    report = doctor.collect()
    assert report.gpus == found
    for line in (
        "NVIDIA H100 80GB HBM3, 81,559 MiB, compute capability 9.0, driver 580.1",
        "RTX, 0 MiB, compute capability 8.9",
    ):
        assert f"  {line}" in report.to_text().splitlines()


def test_text(no_gpu):
    text = doctor.collect().to_text()
    assert "  no NVIDIA GPU found" in text
    assert f"python             {platform.python_version()}" in text


def test_json(no_gpu):
    content = json.loads(json.dumps(doctor.collect().to_json()))
    assert [backend["name"] for backend in content["backends"]] == [
        "onnxruntime",
        "tensorrt-rtx",
        "tensorrt",
    ]
    assert content["gpus"] == []
