from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from dllava_export.errors import SettingError
from dllava_export.precision import (
    BF16,
    FP16,
    FP32,
    NUMBER_FORMATS,
    Precision,
    format_of_dtype,
    numpy_dtype,
)

MIXED = Precision(weights=BF16, activations=FP32, cache=FP16)


def test_formats_are_known_by_name():
    assert NUMBER_FORMATS == {"fp32": FP32, "fp16": FP16, "bf16": BF16}
    assert list(NUMBER_FORMATS) == ["fp32", "fp16", "bf16"]


@pytest.mark.parametrize(
    ("number_format", "stored", "in_numpy", "in_torch"),
    [
        (FP32, "F32", np.float32, torch.float32),
        (FP16, "F16", np.float16, torch.float16),
        (BF16, "BF16", ml_dtypes.bfloat16, torch.bfloat16),
    ],
    ids=NUMBER_FORMATS,
)
def test_a_format_has_a_name_in_each_place(number_format, stored, in_numpy, in_torch):
    assert number_format.stored_name == stored
    assert number_format.numpy == np.dtype(in_numpy)
    assert number_format.numpy.name == number_format.dtype_name
    assert number_format.numpy.itemsize == number_format.num_bytes
    assert number_format.torch == in_torch
    assert str(number_format.torch) == f"torch.{number_format.dtype_name}"
    assert format_of_dtype(number_format.dtype_name) is number_format


@pytest.mark.parametrize("name", ["int64", "float64", "float8_e4m3fn", "fp16"])
def test_other_types_are_no_formats(name):
    assert format_of_dtype(name) is None


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int64", np.int64), ("bool", np.bool_), ("bfloat16", ml_dtypes.bfloat16)],
)
def test_types_by_name(name, dtype):
    assert numpy_dtype(name) == np.dtype(dtype)


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_one_format_for_everything(name):
    precision = Precision.of(name)
    expected = NUMBER_FORMATS[name]
    assert precision == Precision(weights=expected, activations=expected, cache=expected)
    assert str(precision) == name
    assert precision.to_json() == {"weights": name, "activations": name, "cache": name}


def test_parts_of_a_mixed_precision_are_told():
    assert str(MIXED) == "weights bf16, activations fp32, cache fp16"
    assert MIXED.to_json() == {"weights": "bf16", "activations": "fp32", "cache": "fp16"}


@pytest.mark.parametrize("precision", [Precision.of("fp16"), MIXED], ids=["one", "mixed"])
def test_reads_what_it_wrote(precision):
    assert Precision.from_json(precision.to_json()) == precision


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"weights": "fp16", "activations": "fp16"}, id="a part is missing"),
        pytest.param(MIXED.to_json() | {"cache": "int8"}, id="no format"),
    ],
)
def test_parts_that_are_missing_or_no_format(values):
    with pytest.raises(KeyError):
        Precision.from_json(values)


@pytest.mark.parametrize("name", ["int8", "float16", "FP16", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(
        SettingError, match=f"^precision must be one of fp32, fp16, bf16, got '{name}'\\."
    ):
        Precision.of(name)


def test_precisions_compare_and_hash():
    assert Precision.of("fp16") == Precision.of("fp16") != Precision.of("bf16")
    assert len({Precision.of("fp16"), Precision.of("fp16"), MIXED}) == 2
