from __future__ import annotations

import numpy as np
import pytest

from dllava_export.passes.policies.base import Policy, TextArrays
from dllava_export.passes.policies.norm import NormPolicy
from dllava_export.passes.policies.uniform import UniformPolicy

ROWS = TextArrays(
    hidden_states=np.zeros((1, 2), np.float32), position_ids=np.zeros(1, np.int64)
)


def test_a_policy_that_can_keep_tokens_decides_about_text() -> None:
    assert UniformPolicy().decides_text
    assert not NormPolicy().decides_text


def test_one_that_cannot_says_so() -> None:
    with pytest.raises(
        TypeError, match="policy 'norm' does not decide about generated tokens"
    ):
        NormPolicy().reference_keep(ROWS, 0.5, None)


def test_scores_and_reference_must_be_written() -> None:
    class Empty(Policy):
        name = "empty"

    with pytest.raises(TypeError, match=r"abstract methods '?reference'?, '?score'?"):
        Empty()
