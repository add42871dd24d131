"""The KVCacheAttention kernels against NumPy and the op's body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from plugin_checks import run_body

from dllava_export.errors import BackendError
from dllava_export.plugins.check_kernels import (
    TOLERANCES,
    compare_case,
    plugin_part,
    reference_outputs,
)
from dllava_export.plugins.kernel_cases import make_inputs, small_cases

CASES = small_cases("KVCacheAttention")
OVERFULL = CASES[-1]


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_kernel_equals_reference(index: int, interpreted: Callable) -> None:
    case = CASES[index]
    result = compare_case(
        case, interpreted("KVCacheAttention")[index], reference_outputs(case)
    )
    assert result.passed, result
    assert result.tolerance == TOLERANCES[case.dtype]


@pytest.mark.parametrize("index", range(len(CASES) - 1), ids=map(str, CASES[:-1]))
def test_kernel_equals_body(index: int, interpreted: Callable) -> None:
    case, actual = CASES[index], interpreted("KVCacheAttention")[index]
    inputs, attributes = make_inputs(case)
    dtypes = {name: value.dtype for name, value in actual.items()}
    body = run_body("KVCacheAttention", inputs, dtypes, attributes)
    for name in ("present_key", "present_value"):
        assert (actual[name].astype(body[name].dtype) == body[name]).all()
    valid = np.arange(inputs["query"].shape[1]) < inputs["row_lengths"][:, None]
    tolerance = TOLERANCES[case.dtype]
    np.testing.assert_allclose(
        actual["output"][valid].astype(np.float32),
        body["output"][valid].astype(np.float32),
        tolerance,
        tolerance,
    )


def test_rows_that_do_not_fit_are_not_stored(interpreted: Callable) -> None:
    inputs, _ = make_inputs(OVERFULL)
    present = interpreted("KVCacheAttention")[-1]["present_key"]
    start, capacity = inputs["write_index"][0], inputs["past_key"].shape[2]
    stored = inputs["key"].reshape(1, -1, 2, 32).swapaxes(1, 2)[:, :, : capacity - start]
    assert (present[:, :, start:] == stored).all()
    assert (present[:, :, :start] == inputs["past_key"][:, :, :start]).all()


def test_padding_gives_zeros(interpreted: Callable) -> None:
    padded = [i for i, case in enumerate(CASES) if case.sizes["row_lengths"]]
    for i in padded:
        rows = make_inputs(CASES[i])[0]["row_lengths"]
        for b, length in enumerate(rows):
            assert not interpreted("KVCacheAttention")[i]["output"][b, length:].any()
    assert len(padded) == 4


KERNEL = "KVCacheAttention"


def launch(
    tactic: int,
    dtype: str = "float16",
    heads: tuple[int, int, int] = (32, 8, 128),
    **changed: object,
) -> object:
    num_heads, num_kv_heads, head_dim = heads
    cache = (2, num_kv_heads, 2100, head_dim)
    shapes = {
        "query": (2, 70, num_heads * head_dim),
        "key": (2, 70, num_kv_heads * head_dim),
        "value": (2, 70, num_kv_heads * head_dim),
        "past_key": cache,
        "past_value": cache,
    } | changed
    dtypes = dict.fromkeys(shapes, dtype)
    attributes = {"num_heads": num_heads, "kv_num_heads": num_kv_heads, "scale": 0.1}
    return plugin_part(KERNEL, "kernel").launch(shapes, dtypes, attributes, tactic)


@pytest.mark.parametrize(
    ("tactic", "heads", "grid"),
    [
        pytest.param(1, (32, 32, 128), (70, 32, 2), id="a block per row"),
        pytest.param(2, (32, 32, 128), (5, 32, 2), id="16 rows"),
        pytest.param(2, (32, 8, 128), (18, 8, 2), id="4 rows of 4 heads"),
        pytest.param(3, (28, 4, 64), (18, 4, 2), id="4 rows of 7 heads, padded to 8"),
        pytest.param(4, (32, 32, 80), (2, 32, 2), id="64 rows"),
        pytest.param(2, (64, 2, 64), (70, 2, 2), id="more heads than a small tile has rows"),
    ],
)
def test_blocks_share_out_rows_and_key_heads(tactic: int, heads: tuple, grid: tuple) -> None:
    made = launch(tactic, heads=heads)
    assert made.grid == grid
    assert dict(made.integers) == {"rows": 70, "capacity": 2100}


@pytest.mark.parametrize(
    ("heads", "dtype", "expected"),
    [
        pytest.param((32, 32), "float16", (1, 2, 3, 4), id="mha"),
        pytest.param((32, 8), "bfloat16", (2, 3, 4), id="gqa"),
        pytest.param((32, 32), "float32", (1, 2, 3), id="float32"),
    ],
)
def test_offers_only_ways_that_it_can_run(heads: tuple, dtype: str, expected: tuple) -> None:
    attributes = dict(zip(("num_heads", "kv_num_heads"), heads, strict=True))
    kernel = plugin_part(KERNEL, "kernel")
    assert kernel.tactics({}, {"query": dtype}, attributes) == expected


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        pytest.param({"heads": (32, 5, 128)}, "32 heads over 5 key heads", id="heads"),
        pytest.param({"heads": (8, 8, 256)}, "8 key heads of 256", id="wide heads"),
        pytest.param({"query": (2, 70, 99)}, r"widths \[99, 1024, 1024\]", id="width"),
    ],
)
def test_refuses_what_has_no_kernel(arguments: dict, found: str) -> None:
    with pytest.raises(BackendError, match=f"KVCacheAttention: .*{found}.*expected"):
        launch(2, **arguments)
