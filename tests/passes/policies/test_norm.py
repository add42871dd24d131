from __future__ import annotations

import helpers
import numpy as np
from policy_graphs import image_rows, image_scores, reference_scores

from dllava_export.passes.policies.base import ImageArrays
from dllava_export.passes.policies.norm import NormPolicy

NORM = NormPolicy()


def test_scores_equal_the_reference() -> None:
    kinds = [[1, 2, 2, 2], [2, 2, 0, 0], [1, 1]]
    scores, expected = image_scores(NORM, kinds), reference_scores(NORM, kinds)
    for sample, rows in enumerate(image_rows(kinds)[:2]):
        helpers.assert_close(scores[sample, rows], expected[sample])


def test_scores_are_lengths() -> None:
    hidden = np.array([[3, 4], [0, 0], [6, 8]], np.float32)
    rows = ImageArrays(hidden_states=hidden, position_ids=np.arange(3), num_kept=1)
    assert NORM.reference(rows, None).tolist() == [5, 0, 10]


def test_keeps_all_generated_tokens() -> None:
    assert not NORM.decides_text
