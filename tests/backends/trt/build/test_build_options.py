from __future__ import annotations

from pathlib import Path

import pytest

from dllava_export.backends.trt.build.build_options import BuildOptions

RTX, FULL = "tensorrt-rtx", "tensorrt"


@pytest.mark.parametrize(
    ("backend", "settings", "message"),
    [
        ("onnxruntime", {}, "backend must be tensorrt or tensorrt-rtx, got 'onnxruntime'"),
        (RTX, {"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        (RTX, {"max_input_len": -3}, "max_input_len must be at least 1, got -3"),
        (RTX, {"builder_optimization_level": 6}, "must be 0 to 5, got 6"),
        (RTX, {"timing_cache_file": Path("c")}, "timing_cache_file is for tensorrt: "),
        (RTX, {"plugin_paths": (Path("p.so"),)}, "TensorRT-RTX has no plugins"),
        (RTX, {"compute_capabilities": ("sm_89",)}, "must look like 8.9, got 'sm_89'"),
        (RTX, {"compute_capabilities": ("8.9", "8.9")}, "must differ, got 8.9, 8.9"),
        (
            FULL,
            {"compute_capabilities": ("8.9",)},
            "compute_capabilities are for tensorrt-rtx",
        ),
    ],
)
def test_refuses(backend, settings, message):
    with pytest.raises(ValueError, match=message):
        BuildOptions(backend, **settings)


def test_defaults_suit_both_backends():
    for backend in (RTX, FULL):
        assert BuildOptions(backend).max_batch_size == 1
