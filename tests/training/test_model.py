from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tolerances
import torch
from golden import DATA, golden_shapes
from training_factory import (
    PREDICTOR_SIZES,
    assert_session_equals_training,
    dynamic_llava,
    mixed_records,
    one_thread,
    plain_llava,
    read_data,
    write_data,
)

from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.families.predictors import (
    ImagePredictor,
    OutputTextPredictor,
    sample_keep_mask,
)
from dllava_export.training.data import Batch
from dllava_export.training.masked_attention import masked_softmax
from dllava_export.training.model import build_model
from dllava_export.training.settings import TrainingSettings, resolve_predictors

CPU = torch.device("cpu")


__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training_model")


@pytest.fixture(scope="module")
def batch(folder):
    """Two samples: an answer of 11 tokens, and one of 56."""
    data = read_data(dynamic_llava(folder), write_data(folder, mixed_records(2)))
    return Batch.from_samples([data.sample(record) for record in data.records])


def build(path, **changes):
    checkpoint = read_checkpoint(path)
    settings = TrainingSettings(**changes)
    return build_model(checkpoint, resolve_predictors(settings, checkpoint), settings, CPU)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def reference_softmax(scores, keep):
    """The formula, element by element, for one head in float64."""
    num_rows, epsilon = len(scores), 1e-6
    weights = np.zeros((num_rows, num_rows))
    for i in range(num_rows):
        largest = max(scores[i, : i + 1])
        for j in range(i + 1):
            factor = keep[j] + (1 - keep[j]) * (i == j)
            weights[i, j] = np.exp(scores[i, j] - largest) * factor
        weights[i] = (weights[i] + epsilon / num_rows) / (weights[i].sum() + epsilon)
    return weights


@pytest.mark.parametrize("keep", [[1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0.3, 0.9, 0, 1, 0.5]])
def test_masked_softmax_equals_the_formula(keep):
    scores = np.random.default_rng(0).normal(0, 3, (5, 5))
    causal = np.where(np.tri(5, dtype=bool), scores, -np.inf)
    tensor = torch.tensor(causal, dtype=torch.float32)[None, None]
    found = masked_softmax(tensor, torch.tensor([keep], dtype=torch.float32))[0, 0]
    np.testing.assert_allclose(
        found.numpy(), reference_softmax(causal, keep), atol=tolerances.MASKED
    )


def test_masked_softmax_scales_by_the_largest_visible_score_dropped_or_not():
    # A dropped key that dwarfs the others leaves nothing but the eps terms.
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf], [40, 0, -torch.inf], [40, 0, 0]])
    weights = masked_softmax(scores[None, None], torch.tensor([[0.0, 1, 1]]))[0, 0]
    assert weights[2].tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)


def test_sampled_decisions_are_zero_or_one_and_have_the_soft_gradient():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.1, 0.0]], requires_grad=True)
    mask = sample_keep_mask(logits, 0.5, generator())
    assert set(mask.tolist()) <= {0.0, 1.0}
    mask.sum().backward()
    assert (logits.grad.abs() > 0).all()
    assert torch.allclose(logits.grad[:, 0], -logits.grad[:, 1])


def test_decisions_are_kept_as_often_as_their_probability_says():
    logits = torch.tensor([1.0, 0.0]).expand(20000, 2)
    rate = float(sample_keep_mask(logits, 0.7, generator()).mean())
    assert rate == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.02)


def test_predictors_have_the_official_parameters(folder):
    model = build(plain_llava(folder), **PREDICTOR_SIZES)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if "predictor" in name
    }
    golden = golden_shapes("mha")
    assert shapes == {name: golden[name] for name in golden if "predictor" in name}


def test_official_sizes_have_the_official_number_of_parameters(folder):
    config = resolve_predictors(TrainingSettings(), read_checkpoint(plain_llava(folder)))
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in cls(4096, config).parameters())
            for cls in (ImagePredictor, OutputTextPredictor)
        ]
    assert counts == [8_572_034, 2_270_338]


def test_new_predictors_keep_about_half(folder, batch):
    model = build(plain_llava(folder), **PREDICTOR_SIZES)
    losses = model(batch, 1.0, generator())
    assert losses.image_keep_rate == pytest.approx(0.5, abs=0.15)
    assert losses.text_keep_rate == pytest.approx(0.5, abs=0.2)
    error = float(losses.image_mask.detach())
    assert error == pytest.approx(100 * (0.2 - 0.5) ** 2, rel=0.8)


def test_predictors_of_the_checkpoint_are_trained_further(folder):
    path = dynamic_llava(folder)
    model, source = build(path), read_checkpoint(path).tensors
    for name, parameter in model.named_parameters():
        if "predictor" in name:
            assert np.array_equal(parameter.detach().numpy(), source[name].read())


@pytest.mark.parametrize("loss", ["ce", "image_mask", "text_mask"])
def test_gradients_reach_the_predictors(folder, batch, loss):
    model = build(plain_llava(folder), freeze_model=True, **PREDICTOR_SIZES)
    getattr(model(batch, 1.0, generator()), loss).backward()
    with_gradient = {
        prefix
        for prefix in ("image_predictor", "output_text_predictor")
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and parameter.grad is not None and parameter.grad.any()
    }
    both = {"image_predictor", "output_text_predictor"}
    expected = {"image_mask": {"image_predictor"}, "text_mask": {"output_text_predictor"}}
    assert with_gradient == expected.get(loss, both)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        pytest.param({}, {"image", "output", "language", "projector"}, id="all"),
        pytest.param({"freeze_model": True}, {"image", "output"}, id="predictors alone"),
        pytest.param(
            {"train_predictors": False, "freeze_tower": False},
            {"language", "projector", "tower"},
            id="plain LLaVA with its tower",
        ),
    ],
)
def test_what_is_frozen_stays_out(folder, batch, changes, trained):
    sizes = PREDICTOR_SIZES if changes.get("train_predictors", True) else {}
    model = build(plain_llava(folder), **changes, **sizes)
    model(batch, 1.0, generator()).total.backward()
    with_gradient = {
        name.split(".")[0].split("_")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert with_gradient == trained


def test_short_answers_are_kept_whole(folder, batch):
    model = build(plain_llava(folder), **PREDICTOR_SIZES)
    hidden = torch.randn(*batch.input_ids.shape, 64, generator=generator())
    keep, image_mask, text_mask = model.sample_masks(hidden, batch, 1.0, generator())
    short, long = batch.is_answer
    assert (keep[0][short] == 1).all()
    assert not text_mask[0].any()
    assert 0 < keep[1][long].mean() < 1
    assert torch.equal(keep[batch.is_image].view(2, -1), image_mask)
    prompt = ~batch.is_image & ~batch.is_answer
    assert (keep[prompt] == 1).all()


@pytest.mark.parametrize(("minimum", "is_sparse"), [(56, True), (57, False)])
def test_the_end_of_the_answer_counts_as_one_of_its_tokens(folder, batch, minimum, is_sparse):
    model = build(plain_llava(folder), min_answer_tokens=minimum, **PREDICTOR_SIZES)
    losses = model(batch, 1.0, generator())
    assert (losses.text_keep_rate is not None) == is_sparse
    assert bool(losses.text_mask > 0) == is_sparse


def test_the_text_loss_is_a_mean_over_short_answers_too(folder, batch):
    losses = build(plain_llava(folder), **PREDICTOR_SIZES)(batch, 1.0, generator())
    error = 100 * (0.5 - losses.text_keep_rate) ** 2
    assert float(losses.text_mask.detach()) == pytest.approx(error / 2, rel=1e-4)


def test_without_predictors_the_loss_is_that_of_transformers(folder, batch):
    from transformers import LlamaForCausalLM

    model = build(plain_llava(folder), train_predictors=False)
    embeds = model.embed(batch)
    config = copy.deepcopy(model.language_model.config)
    config._attn_implementation = "eager"
    reference = LlamaForCausalLM(config)
    reference.load_state_dict(model.language_model.state_dict())
    with torch.no_grad():
        expected = reference(inputs_embeds=embeds, labels=batch.labels).loss
        found = model(batch, 1.0, generator())
    assert float(found.total) == pytest.approx(float(expected), rel=1e-5)
    assert found.image_keep_rate is None


def test_a_sample_does_not_depend_on_its_batch(folder, batch):
    model = build(dynamic_llava(folder)).eval()
    keep = (torch.rand(batch.input_ids.shape, generator=generator()) < 0.5).float()
    length = int(batch.is_answer[0].nonzero()[-1]) + 1
    embeds = model.embed(batch)
    with torch.no_grad():
        both = model.decode(embeds, lambda _: keep)
        alone = model.decode(embeds[:1, :length], lambda _: keep[:1, :length])
    torch.testing.assert_close(
        both[:1, :length], alone, atol=tolerances.TORCH, rtol=tolerances.TORCH
    )


def test_gradient_checkpointing_changes_nothing(folder, batch):
    gradients = []
    for checkpointing in (False, True):
        model = build(
            plain_llava(folder), gradient_checkpointing=checkpointing, **PREDICTOR_SIZES
        )
        model(batch, 1.0, generator()).total.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_mixed_precision_computes_decisions_in_float32(folder, batch):
    path = plain_llava(folder)
    exact = build(path, freeze_model=True, **PREDICTOR_SIZES)
    mixed = build(path, freeze_model=True, compute_precision="bf16", **PREDICTOR_SIZES)
    assert mixed.language_model.lm_head.weight.dtype == torch.bfloat16
    assert next(mixed.image_predictor.parameters()).dtype == torch.float32
    losses = [model(batch, 1.0, generator()) for model in (exact, mixed)]
    exact_ce, mixed_ce = (float(loss.ce.detach()) for loss in losses)
    assert mixed_ce == pytest.approx(exact_ce, rel=0.02)
    losses[1].total.backward()
    assert mixed.image_predictor.output_mlp[4].weight.grad.dtype == torch.float32


# Training against inference.


def pruned_hidden(model, embeds, keep, sparse_layer):
    """Run the decoder with the dropped rows physically gone; one sample."""
    decoder = model.language_model.model
    positions = torch.arange(embeds.shape[1])[None]
    hidden = embeds
    for index, layer in enumerate(decoder.layers):
        if index == sparse_layer:
            hidden, positions = hidden[:, keep], positions[:, keep]
        hidden = layer(hidden, position_embeddings=decoder.rotary_emb(hidden, positions))
    return decoder.norm(hidden)


def test_a_mask_equals_pruned_rows_at_kept_positions(folder, batch):
    model = build(dynamic_llava(folder)).eval()
    for sample in range(2):
        length = int(batch.is_answer[sample].nonzero()[-1]) + 1
        can_drop = (batch.is_image | batch.is_answer)[sample, :length]
        drawn = torch.rand(length, generator=generator(sample)) < 0.4
        keep = drawn | ~can_drop
        with torch.no_grad():
            embeds = model.embed(batch)[sample : sample + 1, :length]
            masked = model.decode(embeds, lambda _, keep=keep: keep[None].float())
            found = model.logits(masked[:, keep])
            expected = model.logits(pruned_hidden(model, embeds, keep, 2))
        assert not keep.all()
        torch.testing.assert_close(
            found, expected, atol=tolerances.TORCH, rtol=tolerances.TORCH
        )


def test_a_mask_equals_pruned_rows_with_shared_key_heads():
    model = build(DATA / "gqa").eval()
    hidden_size = model.language_model.config.hidden_size
    embeds = torch.randn(1, 40, hidden_size, generator=generator())
    keep = torch.rand(40, generator=generator()) < 0.5
    with torch.no_grad():
        masked = model.decode(embeds, lambda _: keep[None].float())[:, keep]
        expected = pruned_hidden(model, embeds, keep, model._predictors.sparse_layer)
    torch.testing.assert_close(masked, expected, atol=tolerances.TORCH, rtol=tolerances.TORCH)


def test_tied_embeddings_are_trained_as_one(folder, tmp_path, batch):
    shutil.copytree(plain_llava(folder), tmp_path / "tied")
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config))
    model = build(tmp_path / "tied", train_predictors=False)
    language_model = model.language_model
    assert language_model.lm_head.weight is language_model.model.embed_tokens.weight
    model(batch, 1.0, generator()).total.backward()
    assert language_model.lm_head.weight.grad is not None


def test_the_exported_decoder_equals_training(folder, batch, bundles):
    model = build(dynamic_llava(folder)).eval()
    assert_session_equals_training(bundles.fresh_session("mha"), model, batch)


# Settings.


def test_the_temperature_falls_exponentially():
    settings = TrainingSettings()
    assert settings.tau(0, 10) == 1
    assert settings.tau(5, 10) == pytest.approx(0.1**0.5)
    assert settings.tau(10, 10) == pytest.approx(0.1)


def test_learning_rates_rise_then_fall_as_a_cosine():
    settings = TrainingSettings(warmup_ratio=0.03)
    factors = [settings.lr_factor(step, 100) for step in range(101)]
    assert factors[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert factors[3 + 97 // 2] == pytest.approx(0.5, abs=0.02)
    assert factors[100] == pytest.approx(0)
    assert TrainingSettings(warmup_ratio=0).lr_factor(0, 10) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"tau_end": 0.0}, "tau_end must be above 0"),
        ({"model_lr": -1.0}, "model_lr must be at least 0"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\)"),
        ({"precision": "int8"}, "precision must be fp32 or fp16 or bf16, got 'int8'"),
        ({"train_predictors": False, "freeze_model": True}, "nothing would be trained"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 64}, "d_model is 64, but .* has predictors with d_model 32"),
        ({"sparse_layer": 4}, r"sparse_layer must be in 1..3 for 4 decoder layers, got 4"),
        ({"image_keep_rate": 0.01}, "keeps none of 36 image tokens"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        resolve_predictors(TrainingSettings(**changes), read_checkpoint(dynamic_llava(folder)))


def test_settings_left_out_are_those_of_the_checkpoint(folder):
    checkpoint = read_checkpoint(dynamic_llava(folder))
    assert resolve_predictors(TrainingSettings(), checkpoint) == checkpoint.spec.predictors
    changed = resolve_predictors(
        TrainingSettings(image_keep_rate=0.5, use_output_text_predictor=False), checkpoint
    )
    assert changed == dataclasses.replace(
        checkpoint.spec.predictors, vision_keep_rate=0.5, has_output_text=False
    )
