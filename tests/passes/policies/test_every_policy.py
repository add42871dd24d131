"""What holds for every built-in policy, whichever there are: nodes, reference, costs."""

from __future__ import annotations

import dataclasses

import helpers
import numpy as np
import pytest
from policy_graphs import (
    SIZES,
    ScoreGraph,
    image_feeds,
    image_rows,
    image_scores,
    reference_scores,
)

from dllava_export import names
from dllava_export.passes.policies.registry import POLICIES

BUILT_IN = [name for name in POLICIES.names() if POLICIES.find_built_in(name)]
KINDS = [
    pytest.param([[1, *[2] * 11, 1, 1, 1]], id="one image"),
    pytest.param([[1, *[2] * 6, 1, 1, *[2] * 5, 1, 1]], id="text between two images"),
    pytest.param(
        [[*[2] * 3, 1, *[2] * 3, 1, 2, 1]], id="three images, fewer rows than pivots"
    ),
    pytest.param([[1, 1, 1, *[2] * 9]], id="image at the end"),
    pytest.param([[1, 2, 1]], id="one image row"),
    pytest.param([[1, *[2] * 9, *[1] * 90]], id="a long question"),
    pytest.param([[1, *[2] * 11, 1], [*[2] * 11, 1, 1, 1, 1], [1, 1]], id="spans differ"),
    pytest.param([[1, *[2] * 11, 1, 3, 3, 3], [*[2] * 11, 1, 3, 3, 3]], id="answers"),
]

pytestmark = pytest.mark.parametrize("name", BUILT_IN)


def ranked(scores: np.ndarray) -> list[int]:
    """Return rows, the best first; of equal scores the lower row."""
    return np.argsort(-scores, kind="stable").tolist()


@pytest.mark.parametrize("kinds", KINDS)
def test_nodes_equal_the_reference(name: str, kinds: list[list[int]]) -> None:
    policy, weights = POLICIES.get(name), helpers.predictor_weights()
    scores = image_scores(policy, kinds, 0, weights)
    expected = reference_scores(policy, kinds, 0, weights)
    for sample, rows in enumerate(image_rows(kinds)):
        if len(rows):
            helpers.assert_close(scores[sample, rows], expected[sample])
            assert ranked(scores[sample, rows]) == ranked(expected[sample])


def test_nodes_equal_the_reference_on_many_prompts(name: str) -> None:
    policy, weights = POLICIES.get(name), helpers.predictor_weights()
    graph, kinds = ScoreGraph(policy, weights), [[1, *[2] * 40, 1, 1], [*[2] * 40, 1, 1, 1]]
    for seed in range(20):
        feeds = image_feeds(kinds, drop=30, seed=seed)
        expected = reference_scores(policy, kinds, 30, weights, feeds)
        for sample, rows in enumerate(image_rows(kinds)):
            found = graph(feeds)[sample, rows]
            assert ranked(found)[:10] == ranked(expected[sample])[:10]


def test_half_precision_computes_in_single(name: str) -> None:
    policy, weights = POLICIES.get(name), helpers.predictor_weights()
    kinds = [[1, *[2] * 20, 1, 1], [*[2] * 20, 1]]
    feeds = image_feeds(kinds, drop=10)
    for part in ("hidden_states", "query", "key"):
        feeds[part] = feeds[part].astype(np.float16).astype(np.float32)
    halves, wholes = (ScoreGraph(policy, weights, t)(feeds) for t in (np.float16, np.float32))
    assert halves.dtype == np.float32
    assert halves.tolist() == wholes.tolist()


def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    policy, weights = POLICIES.get(name), helpers.predictor_weights()
    kinds = [[1, *[2] * 12, 1, 1, 1, 1], [1, 1, *[2] * 12, 1], [1, 1, 1]]
    graph, feeds = ScoreGraph(policy, weights), image_feeds(kinds, drop=4)
    together = graph(feeds)
    for sample, row_kinds in enumerate(kinds):
        rows = len(row_kinds)
        alone = {
            key: values[sample : sample + 1, :rows] if values.ndim > 1 else values
            for key, values in feeds.items()
        }
        for key in ("row_lengths", names.KEPT_LENGTHS):
            alone[key] = feeds[key][sample : sample + 1]
        image = np.flatnonzero(np.array(row_kinds) == names.IMAGE)
        alone[names.NUM_IMAGE_ROWS] = np.array([len(image)])
        helpers.assert_close(graph(alone)[0, image], together[sample, image])


def test_padding_is_not_looked_at(name: str) -> None:
    policy, kinds = POLICIES.get(name), [[1, *[2] * 9, 1], [*[2] * 9, 1, 1, 1, 1]]
    graph, feeds = ScoreGraph(policy, helpers.predictor_weights()), image_feeds(kinds)
    before = graph(feeds)[0, 1:10]
    for part in ("hidden_states", "query", "key"):
        feeds[part][0, 11:] = np.nan
    assert graph(feeds)[0, 1:10].tolist() == before.tolist()


def test_generated_rows_change_nothing(name: str) -> None:
    """A pass without KV cache keeps the image rows that prefill kept."""
    policy, prompt = POLICIES.get(name), [1, *[2] * 12, 1, 1]
    graph = ScoreGraph(policy, helpers.predictor_weights())
    longer = image_feeds([[*prompt, *[3] * 5]], drop=4)
    shorter = {
        key: values[:, : len(prompt)] if values.ndim > 1 else values
        for key, values in longer.items()
    }
    for key in ("row_lengths", names.KEPT_LENGTHS):
        shorter[key] = longer[key] - 5
    helpers.assert_close(graph(longer)[0, 1:13], graph(shorter)[0, 1:13])


def test_decode_has_no_image(name: str) -> None:
    scores = image_scores(POLICIES.get(name), [[3], [3]], 0, helpers.predictor_weights())
    assert scores.shape == (2, 1)
    assert np.isfinite(scores).all()


def test_products_are_counted(name: str) -> None:
    policy = POLICIES.get(name)
    more = dataclasses.replace(SIZES, num_image_tokens=20)
    assert 0 <= policy.image_flops(SIZES) <= policy.image_flops(more)
