"""Comparison of kernels with references, and what it says of bytes and operations."""

from __future__ import annotations

import numpy as np
import pytest

from dllava_export.plugins import PLUGIN_OPS
from dllava_export.plugins.check_kernels import compare_case, reference_outputs
from dllava_export.plugins.kernel_cases import (
    KernelCase,
    case_work,
    full_cases,
    make_inputs,
    small_cases,
)

ATTENTION = KernelCase(
    "KVCacheAttention",
    {
        "rows": 1,
        "write_index": (3, 7),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "capacity": 9,
    },
    "float16",
)


def test_an_output_equal_to_the_reference_passes() -> None:
    expected = reference_outputs(ATTENTION)
    result = compare_case(ATTENTION, expected, expected)
    assert result.passed
    assert (result.error, result.num_wrong) == (0.0, 0)


def test_a_wrong_number_fails() -> None:
    expected = reference_outputs(ATTENTION)
    output = expected["output"].copy()
    output[1, 0, 5] += 0.1
    result = compare_case(ATTENTION, expected | {"output": output}, expected)
    assert not result.passed
    assert result.error == pytest.approx(
        0.1 / (1 + abs(float(expected["output"][1, 0, 5]))), 0.02
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_fails(value: float) -> None:
    expected = reference_outputs(ATTENTION)
    output = np.full_like(expected["output"], value)
    assert compare_case(ATTENTION, expected | {"output": output}, expected).error == np.inf


def test_a_moved_element_must_be_exact() -> None:
    expected = reference_outputs(ATTENTION)
    present = expected["present_key"].copy()
    present[0, 0, 3, 1] = np.nextafter(present[0, 0, 3, 1], np.float16(9))
    result = compare_case(ATTENTION, expected | {"present_key": present}, expected)
    assert (result.passed, result.num_wrong) == (False, 1)


@pytest.mark.parametrize(
    ("case", "num_bytes", "flops"),
    [
        pytest.param(
            KernelCase("SelectTokens", {"batch": 2, "rows": 10, "num_kept": 3}),
            2 * (10 * 12 + 3 * 8 + 8),
            0,
            id="select",
        ),
        pytest.param(
            KernelCase(
                "GatherTokens",
                {"batch": 2, "rows": 10, "num_kept": 3, "trailing": (5,)},
                "float16",
            ),
            2 * 3 * (2 * 2 * 5 + 8),
            0,
            id="gather",
        ),
        pytest.param(
            # Ten cache rows read, two read and written, of 2 key heads of 8, keys and values.
            ATTENTION,
            2 * 8 * (2 * 2 * (10 + 2 * 2) + 2 * 4 * 2),
            4 * 8 * 4 * (4 + 8),
            id="attention",
        ),
        pytest.param(
            KernelCase(
                "PredictorHead", {"batch": 1, "rows": 1, "hidden_size": 4, "widths": (3, 2, 2)}
            ),
            4 * (12 + 6 + 4 + 4 + 8 + 9 + 4) + 8,
            2 * (12 + 6 + 4 + 4),
            id="predictor",
        ),
    ],
)
def test_work_of_a_case(case: KernelCase, num_bytes: int, flops: int) -> None:
    assert case_work(case) == (num_bytes, flops)


@pytest.mark.parametrize("op", PLUGIN_OPS)
def test_cases_are_distinct_and_repeatable(op: str) -> None:
    for cases in (small_cases(op), full_cases(op)):
        assert len(set(map(str, cases))) == len(cases)
    first, again = (make_inputs(small_cases(op)[0])[0] for _ in range(2))
    assert all((first[name] == again[name]).all() for name in first)


def test_full_cases_cover_what_a_model_needs() -> None:
    sizes = [(case.dtype, case.sizes["head_dim"]) for case in full_cases("KVCacheAttention")]
    assert {dtype for dtype, _ in sizes} == {"float16", "bfloat16", "float32"}
    assert {width for _, width in sizes} == {64, 80, 96, 128}
