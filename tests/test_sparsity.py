from __future__ import annotations

import dataclasses
import json

import pytest

from dllava_export.sparsity import DENSE, Sparsity, num_kept_tokens


def test_counts_in_python_floats() -> None:
    assert num_kept_tokens(100, 0.29) == 28


@pytest.mark.parametrize(
    "settings",
    [{}, {"output_text_keep_rate": 1.0}, {"sparse_layer": 5, "image_keep_tokens": 3},
     {"output_text_policy": "uniform"}],
)  # fmt: skip
def test_dense_is_dense(settings: dict) -> None:
    sparsity = Sparsity("none", **settings)
    assert sparsity == DENSE
    assert hash(sparsity) == hash(DENSE)
    assert sparsity.is_dense
    assert not sparsity.has_keep_bit
    assert sparsity.num_kept_image_tokens(576) == 576


def test_what_has_no_effect_does_not_count() -> None:
    assert Sparsity("random", output_text_policy="random") == Sparsity("random")
    kept = Sparsity("norm", output_text_policy="uniform", output_text_keep_rate=1.0)
    assert kept == Sparsity("norm", output_text_keep_rate=1.0)


def test_text_has_the_image_policy_or_its_own() -> None:
    assert Sparsity("random").text_policy == "random"
    mixed = Sparsity("norm", output_text_policy="uniform", output_text_keep_rate=0.5)
    assert mixed.has_keep_bit
    assert (mixed.policy, mixed.text_policy) == ("norm", "uniform")


def test_says_what_prunes() -> None:
    assert Sparsity("random").policy_text == "random"
    mixed = Sparsity("norm", output_text_policy="uniform")
    assert mixed.policy_text == "norm (generated tokens: uniform)"


def test_survives_a_manifest() -> None:
    mixed = Sparsity("norm", output_text_policy="uniform")
    assert Sparsity(**json.loads(json.dumps(dataclasses.asdict(mixed)))) == mixed


def test_reads_manifests_from_before_text_had_a_policy() -> None:
    old = {"policy": "random", "sparse_layer": 1, "image_keep_rate": 0.3,
           "image_keep_tokens": None, "output_text_keep_rate": 0.4}  # fmt: skip
    assert Sparsity(**old) == Sparsity("random", 1, 0.3, None, 0.4)


@pytest.mark.parametrize(
    "settings", [{"policy": "norm"}, {"policy": "random", "output_text_policy": "norm"}]
)
def test_refuses_a_text_policy_without_a_decision(settings: dict) -> None:
    message = (
        "policy 'norm' ranks image tokens and has no decision for a single generated token, but "
        r"output_text_keep_rate is 0\.5\. Use output_text_keep_rate 1\.0, or an "
        r"output_text_policy: predictor, random, uniform\."
    )
    with pytest.raises(ValueError, match=message):
        Sparsity(**settings)


def test_none_keeps_all_generated_tokens() -> None:
    kept = Sparsity("dart", output_text_policy="none", output_text_keep_rate=1.0)
    assert kept == Sparsity("dart", output_text_keep_rate=1.0)
    message = (
        "output_text_policy is 'none', which keeps all generated tokens, but "
        r"output_text_keep_rate is 0\.5\. Use output_text_keep_rate 1\.0, or an "
        r"output_text_policy that decides: predictor, random, uniform\."
    )
    with pytest.raises(ValueError, match=message):
        Sparsity("dart", output_text_policy="none")


def test_policies_need_not_be_installed() -> None:
    """A bundle holds the nodes of its policy, and runs without it."""
    elsewhere = Sparsity("hiprune", output_text_policy="h2o")
    assert elsewhere.has_keep_bit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_layer": 0}, "sparse_layer must be at least 1, got 0"),
        ({"image_keep_rate": 0}, r"image_keep_rate must be in \(0, 1\], got 0\."),
        (
            {"output_text_keep_rate": 1.5},
            r"output_text_keep_rate must be in \(0, 1\], got 1\.5",
        ),
        ({"image_keep_tokens": 0}, "image_keep_tokens must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("policy", ["random", "none"])
def test_refuses_settings_out_of_range(policy: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsity(policy, **settings)
