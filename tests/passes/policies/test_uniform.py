from __future__ import annotations

import numpy as np
import pytest
from policy_graphs import (
    image_rows,
    image_scores,
    reference_decision,
    reference_scores,
    text_decision,
)

from dllava_export.passes.policies.uniform import UniformPolicy

UNIFORM = UniformPolicy()


@pytest.mark.parametrize("kept", [1, 2, 5, 115, 288, 575, 576])
def test_marks_exactly_as_many_rows_as_are_kept(kept: int) -> None:
    scores = image_scores(UNIFORM, [[1] + [2] * 576 + [1]], drop=576 - kept)
    assert scores[0, 1:-1].sum() == kept


@pytest.mark.parametrize("kept", [2, 5, 115, 288])
def test_marks_are_evenly_spaced(kept: int) -> None:
    marked = np.flatnonzero(image_scores(UNIFORM, [[2] * 576], drop=576 - kept)[0])
    assert set(np.diff(marked).tolist()) <= {576 // kept, 576 // kept + 1}


def test_counts_each_sample_for_itself() -> None:
    scores = image_scores(UNIFORM, [[1, 2, 2, 2, 2], [2, 2, 2, 2, 0], [1, 1]], drop=2)
    marked = [np.flatnonzero(sample[:4]).tolist() for sample in scores]
    assert marked[1] == [1, 3]
    assert (scores[0, 1:] == [0, 1, 0, 1]).all()


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_scores_equal_the_reference(drop: int) -> None:
    kinds = [[1, 2, 2, 2, 2, 2, 1], [2, 2, 2, 0, 0], [1, 1]]
    scores, expected = (
        image_scores(UNIFORM, kinds, drop),
        reference_scores(UNIFORM, kinds, drop),
    )
    for sample, rows in enumerate(image_rows(kinds)):
        assert scores[sample, rows].tolist() == expected[sample].tolist()


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_kept_tokens_are_evenly_spaced(rate: float) -> None:
    keep = text_decision(UNIFORM, np.arange(640, 740)[None], rate)[1][0]
    assert keep.sum() == 100 * rate
    assert len(set(np.diff(np.flatnonzero(keep)).tolist())) <= 2


@pytest.mark.parametrize("rate", [0.3, 1 / 3, 0.999])
def test_decisions_equal_the_reference(rate: float) -> None:
    positions = np.arange(600, 1000).reshape(2, 200)
    scores, keep = text_decision(UNIFORM, positions, rate)
    expected, margins = reference_decision(UNIFORM, positions, rate)
    assert scores.tolist() == expected.tolist()
    assert keep.tolist() == (margins > 0).tolist()
