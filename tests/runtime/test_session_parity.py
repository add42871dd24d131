from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import tolerances
from golden import CASES, DATA, RECOMPUTE_STEPS, feed, load_case, unlowered_feeds, valid_caches
from safetensors.numpy import load_file

from dllava_export import names
from dllava_export.bundles import layout

EVERY_CASE = [
    pytest.param(name, id=f"{checkpoint} {name}") for name, checkpoint in CASES.items()
]
ONE_CASE_EACH = [pytest.param("case_1", id="mha"), pytest.param("case_3", id="gqa")]
KEEPS_ALL = {"image_keep_rate": 1.0, "output_text_keep_rate": 1.0}
TOKENS = np.random.default_rng(5).integers(3, 131, (12, 3))


def assert_close(actual, expected, atol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, equal_nan=False)


# The official code's results, through the session.


@pytest.fixture(scope="module", params=EVERY_CASE)
def case(request):
    return load_case(request.param)


@pytest.fixture(scope="module")
def run(bundles, case):
    session = bundles.session(case.checkpoint)
    run = feed(session, case.input_ids, case.tokens, pixel_values=case.images)
    return run, valid_caches(session)


def test_image_features_are_golden(bundles, case):
    features = bundles.session(case.checkpoint).encode_images(case.images)
    assert_close(features, case["image_features"], tolerances.GOLDEN)


def test_prefill_keeps_the_golden_image_tokens(run, case):
    assert run[0].prefill.kept_image_indices.tolist() == [case.kept_image_indices.tolist()]


def test_prefill_logits_are_golden(run, case):
    assert_close(run[0].prefill.logits, case["prefill_logits"][:, -1], tolerances.GOLDEN)


def test_prefill_caches_are_golden(run, case):
    for layer, (key, value) in enumerate(run[0].prefill_caches):
        assert_close(key, case[f"prefill_key_{layer}"], tolerances.GOLDEN)
        assert_close(value, case[f"prefill_value_{layer}"], tolerances.GOLDEN)


def test_keep_bits_are_golden(run, case):
    assert run[0].keep.tolist() == case["decode_keep"].tolist()


def test_cache_lengths_are_golden_after_each_step(run, case):
    lengths = run[0].cache_lengths[:, :, 0]
    assert lengths.tolist() == case["decode_cache_lengths"].tolist()


def test_decode_logits_are_golden(run, case):
    assert_close(run[0].logits, case["decode_logits"], tolerances.GOLDEN)


def test_final_caches_are_golden(run, case):
    for layer, (key, value) in enumerate(run[1]):
        assert_close(key, case[f"final_key_{layer}"], tolerances.GOLDEN)
        assert_close(value, case[f"final_value_{layer}"], tolerances.GOLDEN)


@pytest.mark.parametrize("num_outputs", RECOMPUTE_STEPS)
def test_recompute_is_golden(bundles, case, num_outputs):
    session = bundles.session(case.checkpoint)
    outputs = case.tokens[:num_outputs].T
    result = session.recompute(case.input_ids, case.images, outputs)
    assert_close(result.logits, case[f"nocache_logits_{num_outputs}"], tolerances.GOLDEN)
    assert result.num_rows.tolist() == [case[f"nocache_seq_after_{num_outputs}"]]


def test_image_features_may_be_given_instead_of_pixels(bundles, case, run):
    session = bundles.session(case.checkpoint)
    prefill = session.prefill(case.input_ids, image_features=case["image_features"])
    assert_close(prefill.logits, run[0].prefill.logits, tolerances.GOLDEN)


# The portable graphs, before they are fitted to ONNX Runtime.


def open_portable(bundles, case, file):
    path = bundles.path(case.checkpoint) / layout.LLM_FOLDER / file
    options = ort.SessionOptions()
    options.log_severity_level = 3  # TensorScatter warns where buffers are not shared
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [entry.name for entry in session.get_outputs()]
    used = {entry.name for entry in session.get_inputs()}

    def run(feeds):
        values = session.run(None, {k: v for k, v in feeds.items() if k in used})
        return dict(zip(outputs, values, strict=True))

    return session, run


def carried_over(outputs):
    state = {
        name.replace("present", "past_key_values"): value
        for name, value in outputs.items()
        if name.startswith("present")
    }
    state[names.write_index(names.FULL)] = outputs[names.next_write_index(names.FULL)]
    state[names.write_index(names.SPARSE)] = outputs[names.next_write_index(names.SPARSE)]
    return state


def empty_state(session, capacity):
    caches = [entry for entry in session.get_inputs() if entry.name.startswith("past_")]
    state = {
        entry.name: np.zeros((1, entry.shape[1], capacity, entry.shape[3]), np.float32)
        for entry in caches
    }
    index = np.zeros(1, np.int64)
    return state | {
        names.write_index(names.FULL): index,
        names.write_index(names.SPARSE): index,
    }


@pytest.mark.parametrize("name", ONE_CASE_EACH)
def test_portable_decoder_is_golden(bundles, name):
    case = load_case(name)
    session, run = open_portable(bundles, case, layout.DECODER)
    embeds = bundles.session(case.checkpoint).embed(case.tokens)
    state = empty_state(session, capacity=case.num_prompt + len(embeds) + 1)
    outputs = run(unlowered_feeds(case, case["inputs_embeds"], 0) | state)
    kept = outputs[names.KEPT_INDICES][0]
    start, end = case["image_span"]
    assert kept[(kept >= start) & (kept < end)].tolist() == list(
        start + case.kept_image_indices
    )
    assert (np.diff(kept) > 0).all()
    assert_close(outputs[names.LOGITS], case["prefill_logits"][:, -1], tolerances.GOLDEN)
    for step, row in enumerate(embeds):
        state = carried_over(outputs)
        outputs = run(unlowered_feeds(case, row[None], case.num_prompt + step) | state)
        assert outputs[names.KEEP].tolist() == case["decode_keep"][step].tolist()
        assert_close(outputs[names.LOGITS], case["decode_logits"][step], tolerances.GOLDEN)
    for layer, length in enumerate(case["decode_cache_lengths"][-1]):
        keys = outputs[names.present(layer, "key")][:, :, :length]
        assert_close(keys, case[f"final_key_{layer}"], tolerances.GOLDEN)


@pytest.mark.parametrize("num_outputs", RECOMPUTE_STEPS)
@pytest.mark.parametrize("name", ONE_CASE_EACH)
def test_portable_recompute_is_golden(bundles, name, num_outputs):
    case = load_case(name)
    _, run = open_portable(bundles, case, layout.RECOMPUTE)
    outputs = bundles.session(case.checkpoint).embed(case.tokens[:num_outputs, 0])
    embeds = np.concatenate([case["inputs_embeds"], outputs[None]], axis=1)
    result = run(unlowered_feeds(case, embeds, 0))
    expected = case[f"nocache_logits_{num_outputs}"]
    assert_close(result[names.LOGITS], expected, tolerances.GOLDEN)
    assert result[names.NUM_ROWS].tolist() == [case[f"nocache_seq_after_{num_outputs}"]]


@pytest.mark.parametrize("name", ONE_CASE_EACH)
def test_a_second_round_equals_the_portable_decoder(bundles, name):
    case, further = load_case(name), np.arange(3, 9)
    session = bundles.session(case.checkpoint)
    feed(session, case.input_ids, case.tokens[:8], pixel_values=case.images)
    extended, after = session.extend([further]), session.decode([9])

    portable, run = open_portable(bundles, case, layout.DECODER)
    state = empty_state(portable, capacity=case.num_prompt + 16)
    outputs = run(unlowered_feeds(case, case["inputs_embeds"], 0) | state)
    chunks = [*case.tokens[:8], further, [9]]
    position = case.num_prompt
    results = []
    for chunk in chunks:
        feeds = unlowered_feeds(case, session.embed(chunk)[None], position)
        if len(chunk) > 1:
            feeds[names.TOKEN_KIND][:] = names.PROMPT_TEXT
        outputs = run(feeds | carried_over(outputs))
        results.append(outputs[names.LOGITS])
        position += len(chunk)
    assert_close(extended.logits, results[-2], tolerances.SAME_MODEL)
    assert_close(after.logits, results[-1], tolerances.SAME_MODEL)
    lengths = carried_over(outputs)
    assert after.cache_lengths[0].tolist() == lengths[names.write_index(names.FULL)].tolist()
    assert (
        after.cache_lengths[-1].tolist() == lengths[names.write_index(names.SPARSE)].tolist()
    )


# Batches: each sample as if it were alone.


@pytest.fixture(scope="module", params=["mha", "gqa"])
def samples(bundles, request):
    """Session, three prompts of different lengths, and images for the first two."""
    first, second = (load_case(n) for n, c in CASES.items() if c == request.param)
    shorter = np.delete(second.input_ids[0], [1, 7, 8])
    prompts = [first.input_ids[0], shorter, np.arange(3, 12)]
    images = np.concatenate([first.images, second.images])
    return bundles.session(request.param), prompts, images


def run_rounds(session, prompts, images, tokens, further):
    """Two rounds of prompt and answer."""
    run = feed(session, prompts, tokens[:8], pixel_values=images)
    extended = session.extend(further)
    steps = [*run.steps, *(session.decode(row) for row in tokens[8:])]
    return run.prefill, extended, steps


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param([0, 1], id="two images"),
        pytest.param([0, 1, 2], id="two images and text"),
        pytest.param([2, 0], id="text first"),
    ],
)
def test_samples_of_a_batch_equal_single_runs(samples, chosen):
    session, prompts, images = samples
    further = [np.arange(3, 9), np.arange(20, 24), np.arange(9, 20)]

    def run(picked):
        pixels = np.stack([images[i] for i in picked if i < 2]) if min(picked) < 2 else None
        texts, more = [prompts[i] for i in picked], [further[i] for i in picked]
        return run_rounds(session, texts, pixels, TOKENS[:, picked], more)

    prefill, extended, steps = run(chosen)
    for row, sample in enumerate(chosen):
        alone_prefill, alone_extended, alone_steps = run([sample])
        kept = prefill.kept_image_indices[row]
        assert kept[kept >= 0].tolist() == alone_prefill.kept_image_indices[0].tolist()
        assert_close(prefill.logits[row], alone_prefill.logits[0], tolerances.SAME_MODEL)
        assert_close(extended.logits[row], alone_extended.logits[0], tolerances.SAME_MODEL)
        for step, alone in zip(steps, alone_steps, strict=True):
            assert step.keep[row] == alone.keep[0]
            assert step.cache_lengths[:, row].tolist() == alone.cache_lengths[:, 0].tolist()
            assert_close(step.logits[row], alone.logits[0], tolerances.SAME_MODEL)


@pytest.mark.parametrize("num_outputs", [0, 1, 12])
def test_samples_of_a_batch_are_recomputed_as_alone(samples, num_outputs):
    session, prompts, images = samples
    outputs = TOKENS[:num_outputs].T
    together = session.recompute(prompts, images, outputs)
    for sample, prompt in enumerate(prompts):
        pixels = images[sample : sample + 1] if sample < 2 else None
        alone = session.recompute([prompt], pixels, outputs[sample : sample + 1])
        assert together.num_rows[sample] == alone.num_rows[0]
        assert_close(together.logits[sample], alone.logits[0], tolerances.SAME_MODEL)


# float16: what is kept may differ only where float32 was nearly undecided.


def test_float16_keeps_what_has_a_margin(bundles, case):
    session = bundles.session(case.checkpoint, "fp16")
    prefill = session.prefill(case.input_ids, case.images)
    assert prefill.kept_image_indices.shape == (1, len(case.kept_image_indices))
    unequal = set(prefill.kept_image_indices[0]) ^ set(case.kept_image_indices)
    assert (case.image_margins()[list(unequal)] <= tolerances.FLOAT16_MARGIN).all()


def test_float16_follows_golden_until_a_near_tie_flips(bundles, case):
    session = bundles.session(case.checkpoint, "fp16")
    prefill = session.prefill(case.input_ids, case.images)
    same_images = prefill.kept_image_indices[0].tolist() == case.kept_image_indices.tolist()
    if not same_images:
        pytest.skip("an image token within the margin flipped: later values are another run's")
    assert_close(prefill.logits, case["prefill_logits"][:, -1], tolerances.FLOAT16)
    for step, tokens in enumerate(case.tokens):
        decoded = session.decode(tokens)
        assert_close(decoded.logits, case["decode_logits"][step], tolerances.FLOAT16)
        if decoded.keep.tolist() != case["decode_keep"][step].tolist():
            assert case.keep_margins()[step] <= tolerances.FLOAT16_MARGIN
            pytest.skip(f"keep bit {step} flipped within the margin: compared up to there")


def test_float16_caches_are_float16(bundles):
    session = bundles.session("mha", "fp16")
    session.prefill([[1, 5, 9]])
    assert {part.dtype.name for part in session.cache(3)} == {"float16"}


# Nothing dropped: the plain decoder, as transformers has it.


@pytest.fixture(scope="module")
def dense_logits():
    """Logits of transformers' LLaMA on golden prompts, after prefill and six more tokens."""
    return {name: transformers_logits(load_case(name), 6) for name in ("case_1", "case_3")}


def transformers_logits(case, num_steps):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = DATA / case.checkpoint
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    used = {k: v for k, v in settings.items() if k not in ("sparse_config", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**used)).eval()
    names_used = set(model.state_dict())
    tensors = load_file(folder / "model.safetensors")
    state = {k: torch.from_numpy(v) for k, v in tensors.items() if k in names_used}
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        prompt = torch.from_numpy(case["inputs_embeds"])
        answer = model.get_input_embeddings()(torch.from_numpy(case.tokens[:num_steps].T))
        logits = model(inputs_embeds=torch.cat([prompt, answer], 1)).logits
    return logits[0, case.num_prompt - 1 :].numpy()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"policy": "none"}, id="dense"),
        pytest.param({"policy": "predictor", **KEEPS_ALL}, id="predictor keeps all"),
        pytest.param({"policy": "random", **KEEPS_ALL}, id="random keeps all"),
        pytest.param({"policy": "uniform", **KEEPS_ALL}, id="uniform keeps all"),
        pytest.param({"policy": "dart", **KEEPS_ALL}, id="dart keeps all"),
        pytest.param({"policy": "attention", **KEEPS_ALL}, id="attention keeps all"),
    ],
)
@pytest.mark.parametrize("name", ONE_CASE_EACH)
def test_keeping_everything_equals_transformers(bundles, dense_logits, name, settings):
    case, expected = load_case(name), dense_logits[name]
    session = bundles.session(case.checkpoint, **settings)
    run = feed(session, case.input_ids, case.tokens[:6], pixel_values=case.images)
    assert_close(run.prefill.logits, expected[:1], tolerances.DENSE)
    assert_close(run.logits[:, 0], expected[1:], tolerances.DENSE)
    assert (run.cache_lengths[-1] == case.num_prompt + 6).all()
    result = session.recompute(case.input_ids, case.images, case.tokens[:6].T)
    assert_close(result.logits, expected[-1:], tolerances.DENSE)


# Conformance of the sparse decoder, beyond golden values (dynamic-llava 10.1).


def test_prefill_drops_rows_from_sparse_layer_on(run, case):
    lengths = run[0].prefill.cache_lengths[:, 0]
    first_sparse = int(np.argmax(lengths < case.num_prompt))
    assert first_sparse == {"mha": 2, "gqa": 3}[case.checkpoint]
    assert (lengths[:first_sparse] == case.num_prompt).all()
    assert (lengths[first_sparse:] == case.num_prompt - case.num_dropped).all()


def test_a_dropped_token_is_missed_from_the_next_step_on(bundles):
    """The token sees itself, so its own step cannot tell whether it will be kept."""
    case = load_case("case_1")
    runs = [
        feed(
            bundles.session("mha", policy="random", output_text_keep_rate=rate),
            case.input_ids,
            case.tokens[:4],
            pixel_values=case.images,
        )
        for rate in (1.0, 1e-9)
    ]
    kept, dropped = runs
    assert kept.keep.all()
    assert not dropped.keep.any()
    assert (dropped.cache_lengths[:, -1] == kept.prefill.cache_lengths[-1]).all()
    assert_close(kept.prefill.logits, dropped.prefill.logits, tolerances.SAME_MODEL)
    difference = np.abs(kept.logits - dropped.logits).max(axis=(1, 2))
    assert difference[0] < tolerances.SAME_MODEL
    assert (difference[1:] > 1e-3).all()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"policy": "random"}, id="random"),
        pytest.param({"policy": "uniform"}, id="uniform"),
        pytest.param({"policy": "random", "output_text_keep_rate": 0.2}, id="random 0.2"),
        pytest.param({"policy": "uniform", "output_text_keep_rate": 0.8}, id="uniform 0.8"),
        pytest.param({"policy": "attention"}, id="attention"),
        pytest.param({"policy": "fastv"}, id="fastv"),
        pytest.param({"policy": "key-diff"}, id="key-diff"),
        pytest.param(
            {"policy": "dart", "output_text_policy": "uniform"}, id="dart and uniform"
        ),
        pytest.param(
            {"policy": "attention", "output_text_policy": "random"}, id="attention and random"
        ),
        pytest.param({"policy": "random", "image_keep_tokens": 3}, id="three image tokens"),
    ],
)
@pytest.mark.parametrize("name", ONE_CASE_EACH)
def test_a_policy_keeps_the_same_rows_in_both_modes(bundles, name, settings):
    case = load_case(name)
    session = bundles.session(case.checkpoint, **settings)
    run = feed(session, case.input_ids, case.tokens, pixel_values=case.images)
    result = session.recompute(case.input_ids, case.images, case.tokens.T)
    prompt_rows = run.prefill.cache_lengths[-1, 0]
    assert result.num_rows.tolist() == [prompt_rows + run.keep[:-1].sum() + 1]
    # What was dropped reached nothing that was kept, so both modes compute the same.
    assert_close(result.logits, run.logits[-1], tolerances.SAME_MODEL)
