"""The PredictorHead kernel against NumPy and the op's body."""

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

CASES = small_cases("PredictorHead")


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_kernel_equals_reference_and_body(index: int, interpreted: Callable) -> None:
    case, actual = CASES[index], interpreted("PredictorHead")[index]
    result = compare_case(case, actual, reference_outputs(case))
    assert result.passed, result
    assert result.tolerance == TOLERANCES["float32"]  # scores are float32 in every precision
    inputs, attributes = make_inputs(case)
    outputs = {"scores": np.dtype(np.float32), "keep": np.dtype(bool)}
    body = run_body("PredictorHead", inputs, outputs, attributes)
    assert body["keep"].tolist() == actual["keep"].astype(bool).tolist()
    np.testing.assert_allclose(actual["scores"], body["scores"], 2e-5, 2e-5)


def test_cases_keep_some_rows_and_drop_some() -> None:
    keep = reference_outputs(CASES[3])["keep"]
    assert 0 < keep.sum() < keep.size


def launch(tactic: int, **shapes: tuple[int, ...]) -> object:
    widths = (4096, 512, 256, 128, 2)
    weights = {f"weight_{i + 1}": (widths[i + 1], widths[i]) for i in range(4)}
    descriptor = plugin_part("PredictorHead", "descriptor").DESCRIPTOR
    dtypes = dict.fromkeys((spec.name for spec in descriptor.inputs), "float16")
    shapes = {"hidden_states": (2, 9, 4096)} | weights | shapes
    kernel = plugin_part("PredictorHead", "kernel")
    return kernel.launch(shapes, dtypes, {"epsilon": 1e-5}, tactic)


@pytest.mark.parametrize(("tactic", "blocks"), [(1, 18), (2, 2)])
def test_a_block_owns_one_row_or_sixteen(tactic: int, blocks: int) -> None:
    made = launch(tactic)
    assert made.grid == (blocks, 1, 1)
    assert dict(made.integers) == {"num_rows": 18}


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        pytest.param({"weight_4": (3, 128)}, r"\(3, 128\)", id="three logits"),
        pytest.param({"weight_2": (256, 500)}, r"\(256, 500\)", id="layers that do not fit"),
        pytest.param(
            {"weight_2": (1024, 512), "weight_3": (128, 1024)}, r"\(1024, 512\)", id="wide"
        ),
    ],
)
def test_refuses_other_widths(shapes: dict, found: str) -> None:
    with pytest.raises(BackendError, match=rf"PredictorHead: hidden size 4096.*{found}"):
        launch(1, **shapes)
