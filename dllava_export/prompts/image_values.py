"""Pixel values and image features as callers give them: real and finite, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from dllava_export.errors import InvalidInputError
from dllava_export.prompts.token_ids import as_array

__all__ = ["checked_values"]


def checked_values(values: Any, what: str, dtype: np.dtype, remedy: str) -> np.ndarray:
    """Return floating-point values as an array.

    Args:
        values: An array, a tensor or nested lists.
        what: Their name, for messages.
        dtype: The type they are computed in: values that it cannot hold are refused.
        remedy: What gives such values, for messages.

    Raises:
        InvalidInputError: If they are of another kind, such as the bytes of a picture, or one
            is NaN, infinite, or beyond `dtype`.
    """
    array = as_array(values, what)
    # A type of ml_dtypes: NumPy itself does not count it among the floating-point ones.
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise InvalidInputError(
            f"{what} is {array.dtype}, expected floating-point values. {remedy}"
        )
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(array.astype(dtype, copy=False))
    if not is_finite.all():
        place = tuple(int(axis[0]) for axis in np.nonzero(~is_finite))
        raise InvalidInputError(
            f"{what} has {int((~is_finite).sum())} values that are not finite in {dtype}, the "
            f"first is {array[place]} at {[*place]}; expected finite ones. {remedy}"
        )
    return array
