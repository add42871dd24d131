"""GatherTokens in NumPy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

__all__ = ["reference"]


def reference(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `kept`; inputs are named as in the descriptor."""
    index = inputs["kept_indices"]
    sample = np.arange(len(index))[:, None]
    return {"kept": inputs["data"][sample, index]}
