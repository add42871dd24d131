from __future__ import annotations

import numpy as np
import pytest
import tolerances

from dllava_export.errors import BackendError
from dllava_export.runtime.sampling import Sampler


def random_logits(batch, vocab_size=50):
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, vocab_size)).astype(np.float32)


def test_temperature_0_takes_the_most_likely_token():
    logits = np.array([[0, 3, 3], [5, -np.inf, 4]], np.float32)
    tokens = Sampler().sample(logits)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [1, 0]


def test_same_seed_gives_the_same_tokens():
    logits = random_logits(3)
    first, second = (Sampler(1.0, seed=7) for _ in range(2))
    runs = [
        [sampler.sample(logits).tolist() for _ in range(10)] for sampler in (first, second)
    ]
    assert runs[0] == runs[1]


def test_other_seed_and_no_seed_give_other_tokens():
    logits = np.zeros((1, 10_000), np.float32)
    samplers = [Sampler(1.0, seed=seed) for seed in (1, 2, None, None)]
    assert len({int(sampler.sample(logits)[0]) for sampler in samplers}) == 4


def test_a_sample_does_not_depend_on_its_batch():
    logits = random_logits(4)
    batch, alone = Sampler(1.0, seed=7), Sampler(1.0, seed=7)
    together = [batch.sample(logits)[2] for _ in range(10)]
    assert together == [alone.sample(logits[2:3], [2])[0] for _ in range(10)]


def test_a_sample_does_not_depend_on_others_finishing():
    logits = random_logits(3)
    whole, shrinking = Sampler(1.0, seed=7), Sampler(1.0, seed=7)
    expected = [whole.sample(logits)[[0, 2]].tolist() for _ in range(4)]
    found = [shrinking.sample(logits)[[0, 2]].tolist()]
    found += [shrinking.sample(logits[[0, 2]], [0, 2]).tolist() for _ in range(3)]
    assert found == expected


def test_samples_of_a_batch_draw_apart():
    tokens = Sampler(1.0, seed=7).sample(np.zeros((20, 10_000), np.float32))
    assert len(set(tokens.tolist())) == 20


def test_draws_by_probability():
    probabilities = np.array([0.1, 0.6, 0.3])
    logits = np.tile(np.log(probabilities).astype(np.float32), (4000, 1))
    counts = np.bincount(Sampler(1.0, seed=0).sample(logits), minlength=3)
    np.testing.assert_allclose(counts / 4000, probabilities, atol=tolerances.FREQUENCY)


def test_temperature_sharpens():
    logits = np.tile(np.log([0.2, 0.8]).astype(np.float32), (4000, 1))
    counts = np.bincount(Sampler(0.5, seed=0).sample(logits), minlength=2)
    np.testing.assert_allclose(
        counts / 4000, [0.04 / 0.68, 0.64 / 0.68], atol=tolerances.FREQUENCY
    )


def test_tiny_temperature_is_greedy():
    logits = random_logits(5)
    tokens = Sampler(1e-308, seed=0).sample(logits)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        pytest.param(0.55, {1}, id="the first reaches it"),
        pytest.param(0.65, {1, 2}, id="the second reaches it"),
        pytest.param(1.0, {0, 1, 2}, id="all"),
        pytest.param(1e-9, {1}, id="never none"),
    ],
)
def test_top_p_takes_the_fewest_tokens_that_reach_it(top_p, expected):
    logits = np.tile(np.log([0.1, 0.6, 0.3]).astype(np.float32), (500, 1))
    assert set(Sampler(1.0, top_p, seed=0).sample(logits).tolist()) == expected


def test_excluded_tokens_are_never_drawn():
    logits = np.full((200, 5), -np.inf, np.float32)
    logits[:, [1, 3]] = 0
    assert set(Sampler(1.0, seed=0).sample(logits).tolist()) == {1, 3}


def test_empty_batch():
    assert Sampler(1.0).sample(np.zeros((0, 5), np.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be at least 0 and finite, got -0\.1\."),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0\."),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1\.1\."),
        ({"seed": -1}, r"seed must be at least 0, got -1\."),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param(
            [np.nan, 1], "have 1 NaN and a maximum of nan, expected finite", id="NaN"
        ),
        pytest.param([np.inf, 1], "have 0 NaN and a maximum of inf", id="infinite"),
        pytest.param([-np.inf, -np.inf], "have 0 NaN and a maximum of -inf", id="no token"),
    ],
)
def test_logits_that_are_not_finite(temperature, row, message):
    logits = np.array([[0, 1], row], np.float32)
    with pytest.raises(BackendError, match=f"Logits of sample 1 {message}"):
        Sampler(temperature).sample(logits)


def test_logits_of_another_shape():
    with pytest.raises(ValueError, match=r"shape \[batch, vocab_size\], got \[5\]\."):
        Sampler().sample(np.zeros(5, np.float32))


def test_sample_indices_of_another_length():
    with pytest.raises(ValueError, match="one sample for each of 2 rows, got 1"):
        Sampler(1.0).sample(np.zeros((2, 5), np.float32), [0])
