from __future__ import annotations

from types import SimpleNamespace

import pytest

from dllava_export.precision import Precision
from dllava_export.validation.settings import Tolerances, ValidationSettings, tolerances_for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"against": "numpy"},
            "against must be one of onnxruntime, dense, torch, got 'numpy'",
        ),
        ({"check_error_stat": "sum"}, "check_error_stat must be one of .*, got 'sum'"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"rtol": -1.0}, r"rtol must be at least 0, got -1\.0"),
        ({"atol": float("nan")}, "atol must be a finite number, got nan"),
        ({"margin": float("inf")}, "margin must be a finite number, got inf"),
        ({"against": "torch"}, "against is 'torch' and checkpoint is None"),
        ({"checkpoint": "folder"}, "against is 'onnxruntime' and checkpoint is 'folder'"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ValidationSettings(**changes)


def test_tolerances_fit_the_precision():
    fp32, fp16, bf16 = (
        tolerances_for(
            ValidationSettings(), SimpleNamespace(precision=Precision.of(precision))
        )
        for precision in ("fp32", "fp16", "bf16")
    )
    for name in ("rtol", "atol", "margin"):
        assert getattr(fp32, name) < getattr(fp16, name) < getattr(bf16, name)


def test_what_is_asked_for_is_taken():
    settings = ValidationSettings(rtol=0.0, margin=0.5, check_error_stat="mean")
    found = tolerances_for(settings, SimpleNamespace(precision=Precision.of("fp32")))
    assert found == Tolerances(rtol=0.0, atol=2e-4, check_error_stat="mean", margin=0.5)
