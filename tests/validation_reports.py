"""Reports of `validate` made by hand."""

from __future__ import annotations

from dllava_export.sparsity import Sparsity
from dllava_export.validation.checks import Check
from dllava_export.validation.comparison import Shape
from dllava_export.validation.report import ValidationReport
from dllava_export.validation.settings import Tolerances


def check(stage, what, verdict="match", relative=1e-6, detail=""):
    return Check(stage, what, verdict, 2 * relative, relative, 1.0, detail)


def make_report(*checks, sparsity=None):
    return ValidationReport(
        bundle="out",
        candidate="onnxruntime",
        reference="PyTorch",
        origin="random values, seed 0",
        shape=Shape(2, 60, 3, 8, 36),
        sparsity=sparsity or Sparsity(sparse_layer=1),
        precision="fp32",
        tolerances=Tolerances(1e-4, 2e-4, "elemwise", 1e-4),
        checks=checks,
    )


STEPS = [
    check("decode.0", "logits", detail="same token"),
    check("decode.1", "logits", relative=3e-6, detail="same token"),
    check("decode.2", "logits", detail="token 3, expected 4"),
]
