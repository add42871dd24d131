"""A sample has the room of its own plan, whatever lies beside it in the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tolerances

from dllava_export.errors import CapacityError

SHORT, LONG = np.arange(3, 9), np.arange(3, 63)
# The predictor goes by its own threshold; only the planned capacity follows the rate.
TIGHT = {"output_text_keep_rate": 0.01}


def random_tokens(num_steps, seed=1):
    return np.random.default_rng(seed).integers(3, 131, num_steps)


def steps(session, prompts, tokens, **settings):
    """What each step gives sample 0; all samples are fed the same tokens."""
    session.prefill(prompts, **settings)
    return [session.decode([token] * len(prompts)) for token in tokens]


def assert_equal_steps(batch, alone, sample=0):
    assert [s.keep[sample] for s in batch] == [s.keep[0] for s in alone]
    assert [s.forced[sample] for s in batch] == [s.forced[0] for s in alone]
    for one, other in zip(batch, alone, strict=True):
        assert one.cache_lengths[:, sample].tolist() == other.cache_lengths[:, 0].tolist()
        np.testing.assert_allclose(
            one.logits[sample], other.logits[0], rtol=0, atol=tolerances.SAME_MODEL
        )


@pytest.mark.parametrize("max_new_tokens", [300, None], ids=["300 tokens", "whole context"])
def test_a_sample_runs_full_beside_a_longer_one_as_it_does_alone(bundles, max_new_tokens):
    session = bundles.session("mha", **TIGHT)
    tokens = random_tokens(250)
    batch = steps(session, [SHORT, LONG], tokens, max_new_tokens=max_new_tokens)
    for sample, prompt in enumerate([SHORT, LONG]):
        alone = steps(session, [prompt], tokens, max_new_tokens=max_new_tokens)
        assert_equal_steps(batch, alone, sample)
        assert sum(step.forced[0] for step in alone) > 10


def test_a_shorter_sample_may_need_the_larger_buffer(bundles):
    # It has more tokens before it, of which a larger number is expected to stay.
    session = bundles.fresh_session("mha", max_length=200)
    long = np.tile(LONG, 4)[:190]
    tokens = random_tokens(10)
    batch = steps(session, [long, SHORT], tokens)
    capacities = session.kv_plan.capacities
    session.prefill([SHORT])
    assert capacities["sparse"] >= session.kv_plan.capacities["sparse"]
    assert_equal_steps(batch, steps(session, [SHORT], tokens), sample=1)


def test_a_sample_s_own_plan_bounds_it_in_every_group(bundles):
    session = bundles.session("mha")
    steps(session, [SHORT, LONG], random_tokens(3), max_new_tokens=3)
    assert session.is_full.tolist() == [True, True]
    with pytest.raises(CapacityError, match=f"sample 1 is full at {len(LONG) + 3} tokens"):
        session.decode([5, 5], active=[False, True])


def test_a_further_prompt_gives_a_sample_the_room_it_gets_alone(bundles):
    session = bundles.session("mha", **TIGHT)
    further, tokens = np.tile(SHORT, 20), random_tokens(200)

    def run(prompts):
        session.prefill(prompts, max_new_tokens=400)
        session.extend([further] * len(prompts))
        return [session.decode([token] * len(prompts)) for token in tokens]

    batch = run([SHORT, LONG])
    for sample, prompt in enumerate([SHORT, LONG]):
        alone = run([prompt])
        assert_equal_steps(batch, alone, sample)


def test_answers_beside_longer_prompts_are_those_alone(bundles):
    session = bundles.fresh_session("mha", **TIGHT)
    session.manifest = dataclasses.replace(
        session.manifest, chat_template=None, eos_token_ids=()
    )
    rng = np.random.default_rng(2)
    num_forced = 0
    for _ in range(3):
        prompts = [rng.integers(3, 131, num) for num in (6, 60, 25)]
        settings = {"max_new_tokens": 200, "temperature": 1.5, "seed": 3}
        together = session.generate(input_ids=prompts, **settings)
        alone = session.generate(input_ids=[prompts[0]], **settings)[0]
        assert together[0].token_ids == alone.token_ids
        assert together[0].num_forced_drops == alone.num_forced_drops
        num_forced += alone.num_forced_drops
    assert num_forced > 0
