from __future__ import annotations

import helpers
import numpy as np
import pytest
from policy_graphs import (
    ScoreGraph,
    image_feeds,
    image_rows,
    image_scores,
    reference_decision,
    reference_scores,
)
from policy_graphs import text_decision as decide

from dllava_export.passes.policies.random_hash import RandomPolicy

RANDOM = RandomPolicy()
KINDS = [[1, 2, 2, 2, 1], [2, 2, 2, 0, 0], [1, 1]]


def test_scores_are_a_hash_of_the_position() -> None:
    helpers.assert_close(image_scores(RANDOM, [[2] * 50]), helpers.hashed(np.arange(50)[None]))


def test_scores_equal_the_reference() -> None:
    scores, expected = image_scores(RANDOM, KINDS), reference_scores(RANDOM, KINDS)
    for sample, rows in enumerate(image_rows(KINDS)):
        assert scores[sample, rows].tolist() == expected[sample].tolist()


def test_scores_do_not_depend_on_what_is_there() -> None:
    first = image_scores(RANDOM, [[1, 2, 2, 1]])
    second = ScoreGraph(RANDOM)(image_feeds([[2, 2, 2, 2]], seed=99))
    assert (first == second).all()


def test_scores_are_distinct_and_spread() -> None:
    scores = np.sort(image_scores(RANDOM, [[2] * 576])[0])
    assert len(set(scores.tolist())) == 576
    assert abs(scores.mean() - 0.5) < 0.05
    assert np.abs(scores - np.linspace(0, 1, 576)).max() < 0.08


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_tokens_are_kept_at_their_rate(rate: float) -> None:
    keep = decide(RANDOM, np.arange(600, 4600)[None], rate)[1]
    assert abs(keep.mean() - rate) < 0.03


def test_a_token_is_kept_where_its_hash_is_below_the_rate() -> None:
    positions = np.arange(20, 40).reshape(2, 10)
    scores, keep = decide(RANDOM, positions, 0.5)
    drawn = helpers.hashed(positions, salt=1 << 20)
    helpers.assert_close(scores, np.float32(0.5) - drawn)
    assert (keep == (drawn < 0.5)).all()


def test_decisions_equal_the_reference() -> None:
    positions = np.arange(700, 900).reshape(2, 100)
    scores, keep = decide(RANDOM, positions, 0.3)
    expected, margins = reference_decision(RANDOM, positions, 0.3)
    assert scores.tolist() == expected.tolist()
    assert keep.tolist() == (margins > 0).tolist()


def test_image_and_text_draw_different_numbers() -> None:
    positions = np.arange(100)
    text = np.float32(0.5) - decide(RANDOM, positions[None], 0.5)[0][0]
    assert np.abs(image_scores(RANDOM, [[2] * 100])[0] - text).min() > 0
