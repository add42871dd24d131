"""Number formats of a bundle: weights, activations, KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np


__all__ = ["Precision"]


Precision = Literal["fp32", "fp16", "bf16"]


_CONFIG_DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _numpy_dtype(precision: str) -> np.dtype:
    import ml_dtypes
    import numpy as np

    types = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    return np.dtype(types[precision])
