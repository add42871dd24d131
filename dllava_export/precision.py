"""Number formats: what weights, activations and KV cache of a bundle are made of."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dllava_export.errors import SettingError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "BF16",
    "FP16",
    "FP32",
    "NUMBER_FORMATS",
    "NumberFormat",
    "Precision",
    "format_of_dtype",
    "numpy_dtype",
]


@dataclasses.dataclass(frozen=True)
class NumberFormat:
    """A floating-point format, under the names that it has in different places.

    Attributes:
        name: In commands, reports and manifests: `fp16`.
        dtype_name: In NumPy (with ml_dtypes), PyTorch, ONNX and `config.json`: `float16`.
        stored_name: In safetensors files: `F16`.
        num_bytes: Bytes of one value.
    """

    name: str
    dtype_name: str
    stored_name: str
    num_bytes: int

    @property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's type; bfloat16 is that of ml_dtypes."""
        return numpy_dtype(self.dtype_name)

    @property
    def torch(self) -> Any:
        """PyTorch's type."""
        import torch

        return getattr(torch, self.dtype_name)


FP32 = NumberFormat("fp32", "float32", "F32", 4)
FP16 = NumberFormat("fp16", "float16", "F16", 2)
BF16 = NumberFormat("bf16", "bfloat16", "BF16", 2)

NUMBER_FORMATS = {known.name: known for known in (FP32, FP16, BF16)}
"""By name; choices of commands and settings come from here."""


def numpy_dtype(dtype_name: str) -> np.dtype[Any]:
    """Return NumPy's type of a name such as `float16` or `int64`, bfloat16 among them."""
    import numpy as np

    if dtype_name != BF16.dtype_name:
        return np.dtype(dtype_name)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def format_of_dtype(dtype_name: str) -> NumberFormat | None:
    """Return the format that NumPy, PyTorch and ONNX call `dtype_name`; None if there is none."""
    return next((f for f in NUMBER_FORMATS.values() if f.dtype_name == dtype_name), None)


@dataclasses.dataclass(frozen=True)
class Precision:
    """What a bundle computes with.

    Attributes:
        weights: How weights are stored.
        activations: What layers compute in; predictors always compute in fp32.
        cache: How keys and values are stored.
    """

    weights: NumberFormat
    activations: NumberFormat
    cache: NumberFormat

    @classmethod
    def of(cls, name: str) -> Precision:
        """Return the precision that uses one format for everything.

        Raises:
            SettingError: If there is no such format.
        """
        if name not in NUMBER_FORMATS:
            raise SettingError(
                f"precision must be one of {', '.join(NUMBER_FORMATS)}, got {name!r}."
            )
        return cls(*[NUMBER_FORMATS[name]] * 3)

    @classmethod
    def from_json(cls, values: dict[str, str]) -> Precision:
        """Return what `to_json` wrote.

        Raises:
            KeyError: If a part is missing or no format.
        """
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(*(NUMBER_FORMATS[values[name]] for name in fields))

    def to_json(self) -> dict[str, str]:
        """Return the name of each part's format."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name).name for name in fields}

    def __str__(self) -> str:
        parts = self.to_json()
        if len(set(parts.values())) == 1:
            return self.weights.name
        return ", ".join(f"{part} {name}" for part, name in parts.items())
