from __future__ import annotations

import numpy as np
import pytest

from dllava_export.validation.policy_scores import score_image_rows, score_text_rows


def test_uniform_keeps_evenly_spaced_rows():
    scores = score_image_rows("uniform", np.arange(7, 17), np.zeros((10, 2)), 4)
    np.testing.assert_array_equal(np.flatnonzero(scores), [2, 4, 7, 9])


def test_norm_is_the_length():
    hidden = np.float32([[3, 4], [0, 0], [6, 8]])
    np.testing.assert_array_equal(
        score_image_rows("norm", np.arange(3), hidden, 1), [5, 0, 10]
    )


def test_random_depends_on_the_position_alone():
    whole = score_image_rows("random", np.arange(50), np.zeros((50, 2)), 5)
    part = score_image_rows("random", np.arange(20, 30), np.ones((10, 2)), 3)
    np.testing.assert_array_equal(part, whole[20:30])
    assert len(set(whole.tolist())) == 50
    assert ((whole >= 0) & (whole < 1)).all()


@pytest.mark.parametrize("policy", ["random", "uniform"])
def test_text_is_kept_at_its_rate(policy):
    scores = score_text_rows(policy, np.arange(2000), 0.3)
    assert (scores > 0).mean() == pytest.approx(0.3, abs=0.03)


def test_text_and_images_draw_different_numbers():
    positions = np.arange(100)
    image = score_image_rows("random", positions, np.zeros((100, 2)), 10)
    text = 0.5 - score_text_rows("random", positions, 0.5)
    assert np.abs(image - text).min() > 0
