from __future__ import annotations

import sys
import types

import pytest
from distributions import installed

from dllava_export.backends import gpus
from dllava_export.backends.gpus import Gpu, find_gpus
from dllava_export.extras import installed_version


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Return a function that stands in a shell script for nvidia-smi."""

    def stand_in(script):
        if sys.platform == "win32":
            pytest.skip("needs a shell")
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        installed(monkeypatch)  # no PyTorch to be asked

    return stand_in


def test_gpus_of_nvidia_smi(nvidia_smi):
    first, second = (
        "NVIDIA H100 80GB HBM3, 81559, 580.1, 9.0",
        "NVIDIA A, B, [N/A], 580.1, 12.1",
    )
    nvidia_smi(f"echo '{first}'; echo '{second}'")
    assert find_gpus() == (
        Gpu("NVIDIA H100 80GB HBM3", 81559, "580.1", "9.0"),
        Gpu("NVIDIA A, B", 0, "580.1", "12.1"),
    )


@pytest.mark.parametrize("script", ["exit 9", "echo no devices were found"])
def test_nvidia_smi_that_finds_nothing(nvidia_smi, script):
    nvidia_smi(script)
    assert find_gpus() == ()


@pytest.fixture
def no_nvidia_smi(monkeypatch):
    monkeypatch.setattr(gpus.shutil, "which", lambda _name: None)


def fake_torch(**properties):
    found = types.SimpleNamespace(**properties)
    cuda = types.SimpleNamespace(
        device_count=lambda: 1, get_device_properties=lambda _index: found
    )
    return types.SimpleNamespace(cuda=cuda)


RTX = Gpu("RTX", 24576, None, "8.9")


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        pytest.param({"torch": "2.9"}, (RTX,), id="torch"),
        pytest.param({"torch": "2.9+cpu"}, (), id="for the CPU"),
        pytest.param({}, (), id="no torch"),
    ],
)
def test_gpus_of_torch(no_nvidia_smi, monkeypatch, versions, expected):
    module = fake_torch(name="RTX", total_memory=24 * 2**30, major=8, minor=9)
    monkeypatch.setitem(sys.modules, "torch", module)
    installed(monkeypatch, **versions)
    assert find_gpus() == expected


def test_torch_that_cannot_be_imported(no_nvidia_smi, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    installed(monkeypatch, torch="2.9")
    assert find_gpus() == ()


def test_the_first_distribution_that_is_installed_counts(monkeypatch):
    installed(monkeypatch, onnxruntime="1.2", onnxruntime_gpu="1.3")
    assert installed_version("onnxruntime-gpu", "onnxruntime") == "1.3"
    assert installed_version("other", "onnxruntime") == "1.2"
    assert installed_version("other") is None
