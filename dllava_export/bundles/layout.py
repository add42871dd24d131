"""Where files lie in a bundle."""

from __future__ import annotations

__all__ = [
    "DATA_FILE",
    "DECODER",
    "DENSE_DECODER",
    "LLM_FOLDER",
    "MANIFEST",
    "PREDICTORS",
    "RECOMPUTE",
    "VISUAL",
    "VISUAL_FOLDER",
]


MANIFEST = "dllava_export.json"


LLM_FOLDER, VISUAL_FOLDER = "llm", "visual"


DECODER, RECOMPUTE, DENSE_DECODER = "model.onnx", "recompute.onnx", "dense.onnx"


PREDICTORS, VISUAL, DATA_FILE = "predictors.onnx", "model.onnx", "model.onnx.data"
