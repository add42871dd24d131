"""The SelectTokens kernel against NumPy and the op's body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from plugin_checks import run_body

from dllava_export import names
from dllava_export.plugins.check_kernels import plugin_part, reference_outputs
from dllava_export.plugins.kernel_cases import make_inputs, small_cases

CASES = small_cases("SelectTokens")


def body(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Run the un-lowered op, which takes `num_kept` where the plugin takes `slots`."""
    inputs = dict(inputs)
    num_kept = np.array([inputs["slots"].shape[1]])
    feeds = {name: num_kept if name == "slots" else value for name, value in inputs.items()}
    return run_body("SelectTokens", feeds, {"kept_indices": np.dtype(np.int64)}, {})[
        "kept_indices"
    ]


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_kernel_equals_reference_and_body(index: int, interpreted: Callable) -> None:
    actual = interpreted("SelectTokens")[index]["kept_indices"]
    assert actual.tolist() == reference_outputs(CASES[index])["kept_indices"].tolist()
    assert actual.tolist() == body(make_inputs(CASES[index])[0]).tolist()


def test_a_case_has_a_tie_at_the_border() -> None:
    case = CASES[4]
    scores = make_inputs(case)[0]["scores"][0]
    kept = reference_outputs(case)["kept_indices"][0]
    assert case.sizes["kinds"] == (names.IMAGE,)
    assert scores[kept].min() in np.delete(scores, kept)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param([1, 2, 2, 2, 0], [1, 2], id="tie"),
        pytest.param([0.0, -0.0, 0.0, -1, -1], [0, 1], id="negative zero"),
        pytest.param([-np.inf, -1, np.inf, 1, 0], [2, 3], id="infinities"),
    ],
)
def test_reference_ranks_like_the_body(scores: list[float], expected: list[int]) -> None:
    inputs = {
        "scores": np.array([scores], np.float32),
        "token_kind": np.full((1, 5), names.IMAGE),
        "slots": np.zeros((1, 2), np.int64),
        "kept_lengths": np.array([2]),
    }
    reference = plugin_part("SelectTokens", "reference").reference
    assert reference(inputs)["kept_indices"].tolist() == [expected]
    assert body(inputs).tolist() == [expected]
