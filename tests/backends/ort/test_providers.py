from __future__ import annotations

import logging

import onnx.parser
import onnxruntime as ort
import pytest

from dllava_export.backends.ort.providers import (
    check_provider,
    execution_providers,
    log_nodes_on_cpu,
)
from dllava_export.errors import BackendError

ADDITION = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2] x) => (float[2] y) { doubled = Add(x, x) y = Add(doubled, x) }"""


def open_on_cpu():
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    model = onnx.parser.parse_model(ADDITION).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_the_cpu_needs_nothing():
    assert execution_providers("cpu") == ["CPUExecutionProvider"]


def test_refuses_an_unknown_provider():
    with pytest.raises(BackendError, match=r"no provider 'rocm' .* expected cpu or cuda"):
        execution_providers("rocm")


def test_says_how_to_get_an_onnx_runtime_with_cuda(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        BackendError, match=r"built for CPUExecutionProvider, without CUDA.* pip"
    ):
        execution_providers("cuda")


def test_cuda_comes_first_and_computes_float32_exactly():
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime was built without CUDA")
    (name, options), fallback = execution_providers("cuda")
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["use_tf32"] == "0"


def test_a_session_that_fell_back_to_the_cpu_is_an_error():
    session = open_on_cpu()
    check_provider(session, "cpu")
    with pytest.raises(
        BackendError, match=r"fell back to the CPU: .* or choose --provider cpu"
    ):
        check_provider(session, "cuda")


def test_ops_without_a_cuda_kernel_are_logged(caplog):
    caplog.set_level(logging.INFO, logger="dllava_export.backends.ort.providers")
    log_nodes_on_cpu(open_on_cpu())
    assert "computed on the CPU: Add x 2" in caplog.text
