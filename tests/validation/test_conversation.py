from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import InvalidInputError
from dllava_export.validation.conversation import conversation_about, random_conversation


@pytest.fixture(scope="module")
def manifest(bundles):
    return read_manifest(bundles.path("mha"), verify=False)


def test_random_values_have_one_image_in_the_prompt(manifest):
    found = random_conversation(manifest, 24, num_steps=5, seed=0)
    assert (found.input_ids == -200).nonzero()[0].tolist() == [8]
    assert found.input_ids.shape == (25,)
    assert found.output_ids.shape == (5,)
    assert found.pixel_values.shape == (1, 3, 24, 24)
    assert found.image_features is None
    ids = np.concatenate([np.delete(found.input_ids, 8), found.output_ids])
    assert ((ids >= 0) & (ids < manifest.geometry.vocab_size)).all()
    assert found.feed["input_ids"].shape == (1, 25)


def test_a_bundle_without_a_tower_is_fed_features(manifest):
    found = random_conversation(manifest, None, num_steps=1, seed=0)
    assert found.pixel_values is None
    assert found.image_features.shape == (1, 36, 64)
    bare = dataclasses.replace(manifest.geometry, num_image_tokens=0)
    bare_manifest = dataclasses.replace(manifest, geometry=bare)
    found = random_conversation(bare_manifest, None, num_steps=1, seed=0)
    assert found.image_features.shape == (1, 64, 64)


def test_an_answer_is_what_the_session_would_say(bundles):
    session = bundles.session("mha")
    found = conversation_about(session, None, "w5 w6", num_steps=4)
    (answer,) = session.generate(["w5 w6"], [None], max_new_tokens=4)
    assert found.output_ids.tolist()[: len(answer.token_ids)] == answer.token_ids
    assert len(found.output_ids) == 4


def test_an_answer_must_fit(bundles):
    session = bundles.fresh_session("mha", max_length=40)
    with pytest.raises(InvalidInputError, match="fit behind the prompt"):
        conversation_about(session, None, "w5 w6", num_steps=24)
