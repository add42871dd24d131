"""PredictorHead in NumPy, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

__all__ = ["reference"]


def reference(inputs: Mapping[str, np.ndarray], epsilon: float) -> dict[str, np.ndarray]:
    """Return `scores` and `keep`; inputs are named as in the descriptor."""
    exact = {name: value.astype(np.float64) for name, value in inputs.items()}
    x = exact["hidden_states"]
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    x = centred / np.sqrt(variance + epsilon) * exact["norm_weight"] + exact["norm_bias"]
    for layer in (1, 2, 3):
        x = _gelu(x @ exact[f"weight_{layer}"].T + exact[f"bias_{layer}"])
    logits = x @ exact["weight_4"].T + exact["bias_4"]
    keep = logits[..., 0] > logits[..., 1]
    return {"scores": logits[..., 0].astype(np.float32), "keep": keep.astype(np.int32)}


def _gelu(x: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return x / 2 * (1 + erf(x / math.sqrt(2)))
