from __future__ import annotations

import shutil

import onnxruntime as ort
import pytest
from golden import DATA
from planted import (
    change_one_weight,
    flip_a_keep_bit,
    plant,
    renumber_positions,
    select_one_row_off,
)

from dllava_export.bundles.manifest import read_manifest, write_manifest
from dllava_export.errors import BackendError, BundleError, InvalidInputError
from dllava_export.passes.policies.registry import POLICIES, untrained_policy_names
from dllava_export.validation.settings import ValidationSettings
from dllava_export.validation.validate import validate_bundle

NUM_PROMPT = 60  # rows of a random prompt of checkpoint mha, 36 of them an image
MHA = str(DATA / "mha")


def run(path, against="torch", **settings):
    """Validate with few steps; against torch from the checkpoint of the golden runs."""
    checkpoint = settings.pop("checkpoint", MHA if against == "torch" else None)
    options = {"num_steps": 5, "num_threads": 1, **settings}
    prompt = {name: options.pop(name) for name in ("image", "prompt") if name in options}
    return validate_bundle(
        path, ValidationSettings(against=against, checkpoint=checkpoint, **options), **prompt
    )


def verdicts(report, what, stage=""):
    return {
        check.verdict
        for check in report.checks
        if check.what == what and check.stage.startswith(stage)
    }


@pytest.fixture
def planted(bundles, tmp_path):
    """Return a bundle of checkpoint mha with an error in it."""
    return lambda change: plant(bundles.path("mha"), tmp_path / "planted", change)


# What is right.


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("against", ["onnxruntime", "dense", "torch"])
def test_a_good_bundle_matches(bundles, against, layers):
    report = run(bundles.path("mha"), against, layers=layers)
    assert report.first_mismatch is None
    assert report.passed
    assert report.has_layers == layers
    assert verdicts(report, "cache_lengths") == {"match"}


def test_shared_key_heads_match_torch(bundles):
    report = run(bundles.path("gqa"), checkpoint=str(DATA / "gqa"), layers=True)
    assert report.first_mismatch is None
    assert verdicts(report, "layers.4/key", "prefill") == {"match"}


@pytest.mark.parametrize("checkpoint", ["mha", "gqa"])
@pytest.mark.parametrize("policy", untrained_policy_names())
def test_policies_without_weights_match_torch(bundles, policy, checkpoint):
    decides = POLICIES.get(policy).decides_text
    rate = 0.4 if decides else 1.0
    path = bundles.path(checkpoint, policy=policy, output_text_keep_rate=rate)
    report = run(path, num_steps=12, checkpoint=str(DATA / checkpoint), layers=True)
    assert report.first_mismatch is None
    assert verdicts(report, "image_scores") == verdicts(report, "kept_indices") == {"match"}
    assert verdicts(report, "keep") == ({"match"} if decides else set())


@pytest.mark.parametrize("policy", untrained_policy_names())
def test_policies_without_weights_match_torch_in_half_precision(bundles, policy):
    path = bundles.path("mha", "fp16", policy=policy, output_text_keep_rate=1.0)
    assert run(path).first_mismatch is None


@pytest.mark.parametrize(
    ("policy", "text_policy"),
    [("dart", "uniform"), ("attention", "predictor"), ("predictor", "random")],
)
def test_text_may_have_a_policy_of_its_own(bundles, policy, text_policy):
    path = bundles.path("mha", policy=policy, output_text_policy=text_policy)
    report = run(path, num_steps=12)
    assert report.first_mismatch is None
    assert verdicts(report, "keep") == verdicts(report, "num_rows") == {"match"}
    assert f"policy {policy} (generated tokens: {text_policy})" in report.to_text()


def test_a_dense_bundle_matches_torch(bundles):
    report = run(bundles.path("mha", policy="none"), layers=True)
    assert report.passed
    assert {check.verdict for check in report.checks} == {"match"}


def test_half_precision_matches_torch_within_its_tolerance(bundles):
    report = run(bundles.path("mha", "fp16"), layers=True)
    assert report.first_mismatch is None
    assert report.tolerances.rtol == 3e-2


def test_pruned_rows_drift_from_dense_from_the_sparse_layer_on(bundles):
    report = run(bundles.path("mha"), "dense", layers=True)
    for index, what, expected in (
        (1, "hidden_states", "match"),
        (2, "key", "match"),  # computed row by row from what all rows see
        (2, "hidden_states", "drift"),
        (3, "value", "drift"),
    ):
        assert verdicts(report, f"layers.{index}/{what}", "prefill") == {expected}
    assert verdicts(report, "logits") == {"drift"}


def test_keeping_everything_equals_dense_exactly(bundles):
    path = bundles.path("mha", image_keep_rate=1.0, output_text_keep_rate=1.0)
    report = run(path, "dense", layers=True)
    assert report.passed
    assert {check.verdict for check in report.checks} == {"match"}


def test_decode_equals_dense_until_the_first_token_is_dropped(bundles):
    path = bundles.path(
        "mha", policy="uniform", image_keep_rate=1.0, output_text_keep_rate=0.5
    )
    report = run(path, "dense", num_steps=4)
    assert report.passed
    found = [c.verdict for c in report.checks if c.what == "logits" and "decode" in c.stage]
    # Every other token is dropped. One that is still sees all the others in its own step.
    assert found[0] == "match"
    assert found[2:] == ["drift", "drift"]


# Planted errors.


def test_a_changed_weight_is_found_in_its_layer(planted):
    path = planted(change_one_weight("model.layers.3.mlp.down_proj.weight"))
    assert run(path, layers=True).first_mismatch.place == "prefill/layers.3/hidden_states"
    assert run(path).first_mismatch.place == "prefill/logits"
    # Both sides of the others read the changed weight.
    assert run(path, "dense").passed


def test_a_changed_key_projection_is_found_in_the_keys(planted):
    path = planted(change_one_weight("model.layers.1.self_attn.k_proj.weight"))
    report = run(path, layers=True)
    assert report.first_mismatch.place == "prefill/layers.1/key"
    assert verdicts(report, "layers.1/value", "prefill") == {"match"}


def test_a_selection_one_row_off_is_found_in_the_kept_rows(planted):
    path = planted(select_one_row_off)
    report = run(path)
    first = report.first_mismatch
    assert first.place == "prefill/kept_indices"
    assert " of 7 flips, at margins up to " in first.detail
    # What follows from other rows is no second error.
    assert verdicts(report, "logits") == {"drift"}
    assert run(path, layers=True).first_mismatch.place == "prefill/image_scores"


def test_a_flipped_keep_bit_is_found_in_its_step(planted):
    report = run(planted(flip_a_keep_bit(NUM_PROMPT + 3)))
    first = report.first_mismatch
    assert first.place == "decode.3/keep"
    assert "at margins up to" in first.detail
    found = {c.stage: c.verdict for c in report.checks if c.what == "logits"}
    assert found["decode.3"] == "match"  # the token still sees itself
    assert found["decode.4"] == "drift"


@pytest.mark.parametrize("against", ["torch", "dense"])
def test_renumbered_positions_are_found_in_the_keys_of_the_sparse_layer(planted, against):
    report = run(planted(renumber_positions), against, layers=True)
    assert report.first_mismatch.place == "prefill/layers.2/key"
    assert verdicts(report, "layers.2/value", "prefill") == {"match"}
    assert verdicts(report, "layers.1/key", "prefill") == {"match"}


# What it is asked.


def test_a_picture_and_a_prompt_are_answered_greedily(bundles):
    cat = str(DATA.parents[1] / "examples" / "cat.png")
    report = run(bundles.path("mha"), image=cat, prompt="w5 w6", num_steps=3)
    assert report.passed
    assert report.origin == f"{cat}, 'w5 w6', greedy answer"
    assert report.shape.num_steps == 3


def test_a_text_prompt_keeps_every_prompt_row(bundles):
    report = run(bundles.path("mha"), "dense", image="none", prompt="w5 w6", num_steps=2)
    assert report.passed
    assert verdicts(report, "logits", "prefill") == {"match"}


def test_a_seed_gives_the_same_values(bundles):
    first, again, other = (
        run(bundles.path("mha"), "dense", seed=seed, num_steps=1) for seed in (1, 1, 2)
    )
    assert first.checks == again.checks
    assert first.checks != other.checks


def test_an_unknown_backend_is_refused(bundles):
    with pytest.raises(BackendError, match=r"^backend must be one of .*, got 'onyx'"):
        run(bundles.path("mha"), "dense", backend="onyx")


def test_the_provider_is_taken(bundles, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="without CUDA"):
        run(bundles.path("mha"), backend_options={"provider": "cuda"}, checkpoint=MHA)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_without_engines_says_what_is_missing(bundles, backend):
    with pytest.raises(BackendError, match=r"cannot be imported|has no engines"):
        run(bundles.path("mha"), backend=backend, checkpoint=MHA)


def test_half_precision_without_kernels_is_refused(bundles):
    with pytest.raises(
        BackendError, match=r"bf16, .* Use another backend, and --against torch"
    ):
        run(bundles.path("mha", "bf16"), "onnxruntime", layers=True)


def test_an_image_without_a_prompt_is_refused(bundles):
    with pytest.raises(InvalidInputError, match=r"\(cat.png\) was given without a prompt"):
        run(bundles.path("mha"), "dense", image="cat.png")


def test_a_checkpoint_of_another_model_is_refused(bundles):
    with pytest.raises(InvalidInputError, match=r"num_key_value_heads 2, the bundle 4"):
        run(bundles.path("mha"), checkpoint=str(DATA / "gqa"))


def test_a_changed_bundle_is_refused_before_it_is_compared(bundles, tmp_path):
    out = tmp_path / "changed"
    shutil.copytree(bundles.path("mha"), out, copy_function=shutil.copyfile)
    change_one_weight("model.layers.3.mlp.down_proj.weight")(out / "llm")
    with pytest.raises(BundleError, match="was changed after the bundle was written"):
        run(out)


def test_every_byte_of_the_bundle_is_checked_first(bundles, tmp_path):
    path = shutil.copytree(bundles.path("mha"), tmp_path / "out")
    large = path / "llm" / "predictors.bin"
    with large.open("wb") as file:
        file.truncate(300 << 20)
    write_manifest(path, read_manifest(bundles.path("mha")))
    with large.open("r+b") as file:
        file.seek(3 << 20)  # between what the quick check reads
        file.write(b"x")
    with pytest.raises(BundleError, match=r"predictors\.bin was changed .* other contents"):
        run(path, "dense")
    large.unlink()
