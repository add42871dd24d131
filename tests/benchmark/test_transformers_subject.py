from __future__ import annotations

import numpy as np
import pytest
import tolerances

from dllava_export.benchmark.transformers_subject import (
    DynamicCacheSubject,
    StaticCacheSubject,
)


@pytest.mark.parametrize("kind", [DynamicCacheSubject, StaticCacheSubject])
def test_cache_has_prompt_filled_rows_and_steps(tiny_model, kind):
    subject = kind(tiny_model)
    subject.prepare(2)
    subject.prefill()
    assert subject.logits().shape == (2, 320)
    subject.decode()
    subject.fill(200)
    assert int(subject._cache.get_seq_length()) == 224
    subject.decode()
    assert int(subject._cache.get_seq_length()) == 225


def test_both_caches_give_the_same_logits(tiny_model):
    found = []
    for kind in (DynamicCacheSubject, StaticCacheSubject):
        subject = kind(tiny_model)
        subject.prepare(1)
        subject.prefill()
        found.append(subject.logits())
    np.testing.assert_allclose(*found, atol=tolerances.MASKED)


def test_static_cache_has_room_for_the_longest_case(tiny_model):
    subject = StaticCacheSubject(tiny_model)
    subject.prepare(1)
    subject.prefill()
    assert subject._cache.layers[0].keys.shape[2] == tiny_model.max_tokens == 24 + 200 + 7
