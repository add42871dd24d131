"""The GatherTokens kernel against NumPy and the op's body."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from plugin_checks import run_body

from dllava_export.errors import BackendError
from dllava_export.plugins.check_kernels import plugin_part, reference_outputs
from dllava_export.plugins.kernel_cases import make_inputs, small_cases

CASES = small_cases("GatherTokens")


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_kernel_equals_reference_and_body(index: int, interpreted: Callable) -> None:
    case, actual = CASES[index], interpreted("GatherTokens")[index]["kept"]
    expected = reference_outputs(case)["kept"]
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert (actual == expected).all()
    inputs, attributes = make_inputs(case)
    kept = run_body("GatherTokens", inputs, {"kept": expected.dtype}, attributes)["kept"]
    assert (kept == actual.astype(kept.dtype)).all()


def test_data_tells_where_it_comes_from() -> None:
    inputs, _ = make_inputs(CASES[4])
    assert len(np.unique(inputs["data"])) == inputs["data"].size
    assert CASES[6].dtype == "bfloat16"
    assert make_inputs(CASES[6])[0]["data"].dtype == ml_dtypes.bfloat16


def launch(data: tuple[object, ...], dtype: str = "float16") -> object:
    shapes = {"data": data, "kept_indices": (2, 179)}
    return plugin_part("GatherTokens", "kernel").launch(shapes, {"data": dtype}, {}, 1)


@pytest.mark.parametrize(
    ("data", "dtype", "tile", "grid"),
    [
        pytest.param((2, 640, 4096), "float16", (1, 2048), (179, 2, 2), id="hidden states"),
        pytest.param((2, 640, 4096), "float32", (1, 1024), (179, 2, 4), id="float32"),
        pytest.param((2, 640), "int64", (256, 1), (1, 2, 1), id="positions"),
        pytest.param((2, 640, 3, 40), "float16", (16, 128), (12, 2, 1), id="four axes"),
    ],
)
def test_a_block_moves_a_tile(data: tuple, dtype: str, tile: tuple, grid: tuple) -> None:
    made = launch(data, dtype)
    assert (made.constants["tile_rows"], made.constants["tile_columns"]) == tile
    assert made.grid == grid
    assert dict(made.integers) == {"rows": 640, "num_kept": 179}


def test_refuses_rows_of_unknown_width() -> None:
    with pytest.raises(BackendError, match=r"'data' has shape \(2, 640, 'width'\).*fixed"):
        launch((2, 640, "width"))
