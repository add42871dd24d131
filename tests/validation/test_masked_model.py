from __future__ import annotations

import dataclasses

import checkpoint_factory
import numpy as np
import pytest
import tolerances
from golden import DATA, load_case
from tolerances import GOLDEN

from dllava_export.bundles.manifest import read_manifest
from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.errors import CheckpointError, InvalidInputError
from dllava_export.validation.masked_model import load_masked_model


@pytest.fixture(params=["case_1", "case_3"])
def golden(request, bundles):
    """A golden run of the official code, and the same rows in masked passes."""
    case = load_case(request.param)
    manifest = read_manifest(bundles.path(case.checkpoint), verify=False)
    model = load_masked_model(str(DATA / case.checkpoint), manifest)
    rows = model.rows(case.input_ids[0], case.tokens[:, 0], case.images, None)
    return case, manifest, rows, *model.forward(rows, None)


def test_it_decides_as_the_official_code_does(golden):
    case, _, rows, _, selection = golden
    kept = np.flatnonzero(selection.kept[rows.is_image])
    np.testing.assert_array_equal(kept, case.kept_image_indices)
    np.testing.assert_array_equal(selection.kept[case.num_prompt :], case["decode_keep"][:, 0])
    assert selection.kept[: case.num_prompt][~rows.is_image[: case.num_prompt]].all()
    np.testing.assert_allclose(
        selection.image_scores, case.image_scores, rtol=tolerances.TORCH
    )


def test_it_computes_what_the_official_code_does(golden):
    case, manifest, _, forward, selection = golden
    end = case.num_prompt
    assert np.abs(forward.logits[end - 1] - case["prefill_logits"][0, -1]).max() < GOLDEN
    assert np.abs(forward.logits[end:] - case["decode_logits"][:, 0]).max() < GOLDEN
    for layer, keys in enumerate(forward.keys):
        is_full = layer < manifest.sparsity.sparse_layer
        found = keys[:end] if is_full else keys[:end][selection.kept[:end]]
        expected = case[f"prefill_key_{layer}"][0].swapaxes(0, 1)
        assert np.abs(found - expected.reshape(len(expected), -1)).max() < GOLDEN


def test_a_checkpoint_that_is_not_there(bundles):
    manifest = read_manifest(bundles.path("mha"), verify=False)
    with pytest.raises(CheckpointError):
        load_masked_model(str(DATA / "missing" / "nowhere"), manifest)


def test_predictors_must_be_there(bundles, tmp_path):
    checkpoint_factory.make_checkpoint(tmp_path / "plain", "llava")
    manifest = read_manifest(bundles.path("mha"), verify=False)
    config = read_checkpoint(str(tmp_path / "plain")).spec.text_config
    geometry = dataclasses.replace(
        manifest.geometry,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
    )
    with pytest.raises(InvalidInputError, match="lacks predictors that the bundle has"):
        load_masked_model(
            str(tmp_path / "plain"), dataclasses.replace(manifest, geometry=geometry)
        )


def test_a_checkpoint_with_fewer_layers(bundles, tmp_path):
    checkpoint_factory.make_checkpoint(tmp_path / "plain", "llava")
    manifest = read_manifest(bundles.path("mha"), verify=False)
    with pytest.raises(InvalidInputError, match="has num_hidden_layers 3, the bundle 4"):
        load_masked_model(str(tmp_path / "plain"), manifest)
