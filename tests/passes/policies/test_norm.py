from __future__ import annotations

import helpers
from policy_graphs import (
    ScoreGraph,
    image_feeds,
    image_rows,
    image_scores,
    reference_scores,
)

from dllava_export.passes.policies.norm import NormPolicy

NORM = NormPolicy()


def test_scores_equal_the_reference() -> None:
    kinds = [[1, 2, 2, 2], [2, 2, 0, 0], [1, 1]]
    scores, expected = image_scores(NORM, kinds), reference_scores(NORM, kinds)
    for sample, rows in enumerate(image_rows(kinds)[:2]):
        helpers.assert_close(scores[sample, rows], expected[sample])


def test_the_shortest_hidden_states_score_highest() -> None:
    feeds = image_feeds([[2, 2, 2]])
    feeds["hidden_states"][:] = 0
    feeds["hidden_states"][0, :, :2] = [[3, 4], [0, 0], [6, 8]]
    assert ScoreGraph(NORM)(feeds).tolist() == [[-5, 0, -10]]
    assert reference_scores(NORM, [[2, 2, 2]], feeds=feeds)[0].tolist() == [-5, 0, -10]


def test_keeps_all_generated_tokens() -> None:
    assert not NORM.decides_text
