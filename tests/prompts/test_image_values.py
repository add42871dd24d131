from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from dllava_export.errors import InvalidInputError
from dllava_export.prompts.image_values import checked_values

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)


def checked(values, dtype=FLOAT32):
    return checked_values(values, "pixel_values", dtype, "Use the processor.")


@pytest.mark.parametrize(
    "values",
    [
        np.ones(2),
        np.ones(2, np.float16),
        np.ones(2, ml_dtypes.bfloat16),
        torch.ones(2),
        [1.0, 1.0],
    ],
    ids=["float64", "float16", "bfloat16", "tensor", "list"],
)
def test_takes_floating_point_values(values):
    assert checked(values).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.ones(2, np.uint8), "uint8"),
        (np.ones(2, np.int64), "int64"),
        (np.ones(2, bool), "bool"),
        (np.ones(2, np.complex64), "complex64"),
        (["1"], "<U1"),
        ([None], "object"),
        ([[1.0], [1.0, 2.0]], "cannot be read as an array"),
        (torch.ones(2, dtype=torch.bfloat16), "cannot be read as an array"),
    ],
)
def test_refuses_other_kinds(values, found):
    with pytest.raises(InvalidInputError, match=f"pixel_values .*{found}"):
        checked(values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_refuses_what_is_not_finite(value):
    values = np.zeros((2, 3))
    values[1, 2] = value
    with pytest.raises(
        InvalidInputError, match=r"1 values that are not finite in float32, .* at \[1, 2\]"
    ):
        checked(values)


def test_refuses_what_the_bundle_s_type_cannot_hold():
    assert checked(np.array([1e5])).tolist() == [1e5]
    with pytest.raises(InvalidInputError, match="not finite in float16, the first is 100000"):
        checked(np.array([1e5]), FLOAT16)
