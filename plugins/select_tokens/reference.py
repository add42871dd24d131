"""SelectTokens in NumPy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dllava_export import names

__all__ = ["reference"]


def reference(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `kept_indices`; inputs are named as in the descriptor."""
    kinds, num_kept = inputs["token_kind"], inputs["slots"].shape[1]
    fixed = np.where(kinds == names.PADDING, np.float32(-3e38), np.float32(3e38))
    ranked = np.where(kinds == names.IMAGE, inputs["scores"], fixed)
    kept = np.full((len(kinds), num_kept), kinds.shape[1] - 1, np.int64)
    for b, length in enumerate(inputs["kept_lengths"]):
        best = np.argsort(-ranked[b], kind="stable")[: min(length, num_kept)]
        kept[b, : len(best)] = np.sort(best)
    return {"kept_indices": kept}
