from __future__ import annotations

import dataclasses

import helpers
import numpy as np
import pytest
import torch
from policy_graphs import (
    SIZES,
    image_rows,
    image_scores,
    official_image_logits,
    reference_decision,
    reference_scores,
    text_decision,
)

from dllava_export import names
from dllava_export.errors import PreconditionError
from dllava_export.passes.policies.predictor import PredictorPolicy
from dllava_export.passes.policies.weights import PredictorWeights

PREDICTOR = PredictorPolicy()
KINDS = [
    pytest.param([[1, 2, 2, 2, 2, 2, 1]], id="one image"),
    pytest.param([[1, 2, 1]], id="one image row"),
    pytest.param([[2, 2, 1, 2, 1]], id="two images"),
    pytest.param([[1, 2, 2, 2, 1], [2, 2, 2, 0, 0]], id="spans differ"),
    pytest.param([[1, 2, 2, 1], [1, 1, 1, 1]], id="a sample without an image"),
]


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("kinds", KINDS)
def test_scores_are_the_official_ones(kinds: list[list[int]], blocks: int) -> None:
    weights = helpers.predictor_weights(blocks=blocks)
    scores = image_scores(PREDICTOR, kinds, weights=weights)
    hidden = helpers.embeddings(*scores.shape)
    for sample, row_kinds in enumerate(kinds):
        rows = np.flatnonzero(np.array(row_kinds) == names.IMAGE)
        if len(rows):
            expected = official_image_logits(torch.from_numpy(hidden[sample, rows]), weights)
            helpers.assert_close(scores[sample, rows], expected[:, 0].numpy())


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("kinds", KINDS)
def test_scores_equal_the_reference(kinds: list[list[int]], blocks: int) -> None:
    weights = helpers.predictor_weights(blocks=blocks)
    scores = image_scores(PREDICTOR, kinds, weights=weights)
    expected = reference_scores(PREDICTOR, kinds, weights=weights)
    for sample, rows in enumerate(image_rows(kinds)):
        if len(rows):
            helpers.assert_close(scores[sample, rows], expected[sample])


def test_takes_no_image_rows_at_all() -> None:
    scores = image_scores(PREDICTOR, [[3], [3]], weights=helpers.predictor_weights())
    assert scores.tolist() == [[0], [0]]


def test_in_half_precision_computes_in_single() -> None:
    whole = helpers.predictor_weights()
    halved = {k: np.asarray(v).astype(np.float16) for k, v in whole.tensors.items()}
    rounded = {k: v.astype(np.float32) for k, v in halved.items()}
    kinds = [[1, 2, 2, 2, 1]]
    actual = image_scores(PREDICTOR, kinds, weights=PredictorWeights(halved, 2))
    assert actual.dtype == np.float32
    helpers.assert_close(
        actual, image_scores(PREDICTOR, kinds, weights=PredictorWeights(rounded, 2))
    )


def test_a_token_is_kept_by_its_logits_alone() -> None:
    positions = np.arange(64)[None]
    scores, keep = text_decision(PREDICTOR, positions, 0.5, helpers.predictor_weights())
    other = text_decision(PREDICTOR, positions + 9, 0.1, helpers.predictor_weights())
    assert 0 < keep.sum() < 64
    assert (scores == other[0]).all()
    assert (keep == other[1]).all()


def test_decisions_equal_the_reference() -> None:
    positions, weights = np.arange(64).reshape(2, 32), helpers.predictor_weights()
    scores, keep = text_decision(PREDICTOR, positions, 0.5, weights)
    expected, margins = reference_decision(PREDICTOR, positions, 0.5, weights)
    helpers.assert_close(scores, expected)
    assert keep.tolist() == (margins > 0).tolist()


@pytest.mark.parametrize("tensors", [{}, {"image_predictor.down_mlp.0.weight": np.ones(8)}])
def test_names_the_weight_that_is_missing(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(
        PreconditionError, match=r"^The checkpoint has no image_predictor \('ima"
    ):
        image_scores(PREDICTOR, [[1, 2]], weights=PredictorWeights(tensors))


def test_needs_an_output_text_predictor_for_text() -> None:
    with pytest.raises(PreconditionError, match="has no output_text_predictor"):
        text_decision(PREDICTOR, np.zeros((1, 1), np.int64), 0.5, None)


def test_counts_its_products() -> None:
    # Per row: 8 x 4 down; qkv and projection 4 x 4 each, MLP 2 x 4 x 6; out 4 x 2, 2 x 1, 1 x 2.
    per_row = 8 * 4 + 4 * 4 * 4 + 2 * 4 * 6 + (4 * 2 + 2 * 1 + 1 * 2)
    assert PREDICTOR.image_flops(SIZES) == 2 * (10 * per_row + 2 * 10**2 * 4)
    assert PREDICTOR.text_flops(SIZES) == 2 * (8 * 4 + 4 * 2 + 2 * 1 + 1 * 2)


def test_cannot_count_without_sizes() -> None:
    sizes = dataclasses.replace(SIZES, predictor=None)
    for count in (PREDICTOR.image_flops, PREDICTOR.text_flops):
        with pytest.raises(ValueError, match="but the geometry has no predictor"):
            count(sizes)
