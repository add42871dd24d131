from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import tolerances
from golden import feed, load_case

from dllava_export.backends.kv_plan import SPARE_ROWS
from dllava_export.backends.ort.backend import OrtBackend
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import (
    BackendError,
    BundleError,
    CapacityError,
    InvalidInputError,
    SettingError,
)
from dllava_export.runtime.loading import check_image_choice, load
from dllava_export.runtime.session import Session

PROMPT = np.arange(3, 13)
IMAGE_PROMPT = np.array([1, 5, -200, 9, 7])
KEEPS_HALF = {"policy": "uniform", "output_text_keep_rate": 0.5}
# The predictor goes by its own threshold; only the planned capacity follows the rate.
TIGHT = {"output_text_keep_rate": 0.01}


def pixels(num_images=1, size=84, seed=0):
    return np.random.default_rng(seed).normal(size=(num_images, 3, size, size))


def random_tokens(num_steps, batch=1, seed=2):
    return np.random.default_rng(seed).integers(3, 131, (num_steps, batch))


def changed_session(bundles, backend=OrtBackend, max_length=512, **changes):
    """A session of the test's own over `mha`, with changes to its manifest."""
    folder = bundles.path("mha")
    manifest = dataclasses.replace(read_manifest(folder, verify=False), **changes)
    return Session(folder, manifest, backend(folder, manifest, num_threads=1), max_length)


def assert_close(actual, expected, atol=tolerances.SAME_MODEL):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, equal_nan=False)


# Cache buffers.


def test_decode_writes_the_buffers_in_place(bundles):
    session = bundles.session("mha", **KEEPS_HALF)
    session.prefill([IMAGE_PROMPT], pixels(), max_new_tokens=20)
    before = [part for layer in range(4) for part in session.cache(layer)]
    copies = [part.copy() for part in before]
    for token in random_tokens(10):
        session.decode(token)
    after = [part for layer in range(4) for part in session.cache(layer)]
    for old, new, copy in zip(before, after, copies, strict=True):
        assert np.shares_memory(old, new)
        assert (old != copy).any()


def test_decode_leaves_earlier_rows_alone(bundles):
    session = bundles.session("mha")
    session.prefill([IMAGE_PROMPT], pixels(), max_new_tokens=30)
    for token in random_tokens(20):
        lengths = session.cache_lengths[:, 0]
        before = [session.cache(i)[0][:, :, :n].copy() for i, n in enumerate(lengths)]
        session.decode(token)
        for layer, keys in enumerate(before):
            assert np.array_equal(session.cache(layer)[0][:, :, : keys.shape[2]], keys)


def test_generated_tokens_stand_behind_the_whole_prompt(bundles, monkeypatch):
    """Not behind the rows that stayed: positions are never renumbered."""
    fed, decode = [], OrtBackend.decode
    monkeypatch.setattr(
        OrtBackend,
        "decode",
        lambda self, inputs: fed.append(inputs.position_ids.tolist()) or decode(self, inputs),
    )
    session = bundles.fresh_session("mha", policy="dart", image_keep_tokens=9)
    prefill = session.prefill([IMAGE_PROMPT, PROMPT], pixels(), max_new_tokens=8)
    assert prefill.cache_lengths[-1].tolist() == [4 + 9, 10]
    for token in random_tokens(3, batch=2):
        session.decode(token)
    assert fed == [[[40 + step], [10 + step]] for step in range(3)]


def test_results_are_copies(bundles):
    session = bundles.session("mha")
    prefill = session.prefill([PROMPT], max_new_tokens=8)
    first = session.decode([5])
    copies = prefill.logits.copy(), first.logits.copy(), first.cache_lengths.copy()
    session.decode([6])
    for array, copy in zip(
        (prefill.logits, first.logits, first.cache_lengths), copies, strict=True
    ):
        assert np.array_equal(array, copy)


def test_prefill_starts_anew(bundles):
    session = bundles.session("mha")
    first = feed(session, [IMAGE_PROMPT], random_tokens(5), pixel_values=pixels())
    feed(session, [PROMPT, PROMPT[:4]], random_tokens(3, batch=2))
    again = feed(session, [IMAGE_PROMPT], random_tokens(5), pixel_values=pixels())
    assert np.array_equal(first.logits, again.logits)
    assert first.keep.tolist() == again.keep.tolist()


def test_a_failed_prefill_leaves_the_conversation_alone(bundles):
    session = bundles.session("mha")
    session.prefill([PROMPT], max_new_tokens=8)
    before = session.cache_lengths
    with pytest.raises(InvalidInputError):
        session.prefill([IMAGE_PROMPT])
    assert np.array_equal(session.cache_lengths, before)
    assert session.decode([5]).cache_lengths[0].tolist() == [len(PROMPT) + 1]


def test_dense_bundles_have_one_group_of_caches(bundles):
    session = bundles.session("mha", policy="none")
    session.prefill([IMAGE_PROMPT], pixels(), max_new_tokens=8)
    decoded = session.decode([5])
    assert session.kv_plan.groups[-1].name == "full"
    assert decoded.cache_lengths[:, 0].tolist() == [4 + 36 + 1] * 4
    assert decoded.keep.tolist() == [True]
    assert decoded.forced.tolist() == [False]


# Full caches.


@pytest.fixture(scope="module")
def overflow(bundles):
    """A run whose sparse caches fill up, one with room enough, and the session of the first."""
    tokens = random_tokens(200)
    roomy = feed(bundles.session("mha"), [PROMPT], tokens, max_new_tokens=200)
    session = bundles.fresh_session("mha", **TIGHT)
    tight = feed(session, [PROMPT], tokens, max_new_tokens=200)
    return tight, roomy, session


def test_a_full_sparse_cache_forces_drops(overflow):
    tight, roomy, session = overflow
    capacity = session.kv_plan.capacities["sparse"]
    lengths = tight.cache_lengths[:, -1, 0]
    forced = np.stack([step.forced for step in tight.steps])
    full_at = int(np.argmax(lengths == capacity - 1))
    assert 0 < full_at < 200
    assert lengths.max() == capacity - 1
    assert not forced[: full_at + 1].any()
    assert not tight.keep[full_at + 1 :].any()
    assert forced.sum() > 10
    first = int(np.argmax(forced))
    assert tight.keep[:first].tolist() == roomy.keep[:first].tolist()
    assert roomy.keep[first]


def test_the_first_forced_drop_shows_one_step_later(overflow):
    tight, roomy, _ = overflow
    first = int(np.argmax([step.forced[0] for step in tight.steps]))
    assert_close(tight.logits[: first + 1], roomy.logits[: first + 1])
    assert np.abs(tight.logits[first + 1] - roomy.logits[first + 1]).max() > 1e-3
    assert np.isfinite(tight.logits).all()


def test_a_full_sparse_cache_is_not_written(overflow):
    _, _, session = overflow
    valid = session.kv_plan.capacities["sparse"] - 1
    before = [part[:, :, :valid].copy() for i in (2, 3) for part in session.cache(i)]
    full_before = [session.cache(i)[0][:, :, : len(PROMPT) + 199].copy() for i in (0, 1)]
    lengths = session.cache_lengths
    lengths[:2] -= 5
    session.rewind(lengths)  # room for some more steps
    for token in random_tokens(5, seed=3):
        session.decode(token)
    after = [part[:, :, :valid] for i in (2, 3) for part in session.cache(i)]
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(
        np.array_equal(
            session.cache(i)[0][:, :, : len(PROMPT) + 194], full_before[i][:, :, :-5]
        )
        for i in (0, 1)
    )


def test_decode_fills_the_cache_to_the_last_planned_token(bundles):
    session = bundles.session("mha")
    session.prefill([PROMPT, PROMPT[:4]], max_new_tokens=3)
    for token in random_tokens(3, batch=2):
        assert not session.is_full.any()
        session.decode(token)
    assert session.is_full.tolist() == [True, True]
    with pytest.raises(
        CapacityError,
        match=r"sample 0 is full at 13 tokens\. Allow more with a larger max_new_tokens",
    ):
        session.decode([5, 5])


def test_a_finished_sample_may_be_full_and_does_not_change(bundles):
    session = bundles.fresh_session("mha", max_length=12)
    session.prefill([PROMPT, PROMPT[:4]])
    for token in random_tokens(2, batch=2):
        session.decode(token)
    before = [part[0, :, :12].copy() for i in range(4) for part in session.cache(i)]
    decoded = session.decode([5, 6], active=[False, True])
    assert decoded.keep[0] == decoded.forced[0] == np.False_
    assert decoded.cache_lengths[0].tolist() == [12, 7]
    lengths = session.cache_lengths[:, 0]
    after = [part[0, :, :12] for i in range(4) for part in session.cache(i)]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(old[:, : lengths[i // 2]], new[:, : lengths[i // 2]])


def test_inactive_samples_do_not_disturb_active_ones(bundles):
    session = bundles.session("mha")
    tokens = random_tokens(6, batch=2)
    session.prefill([PROMPT, PROMPT[:4]], max_new_tokens=8)
    together = [session.decode(row, active=[False, True]) for row in tokens]
    assert together[-1].cache_lengths[0].tolist() == [len(PROMPT), 4 + 6]
    session.prefill([PROMPT[:4]], max_new_tokens=8)
    for row, step in zip(tokens, together, strict=True):
        alone = session.decode(row[1:])
        assert_close(step.logits[1], alone.logits[0])
        assert step.keep[1] == alone.keep[0]


def test_max_length_bounds_prompt_and_answer_together(bundles):
    session = bundles.fresh_session("mha", max_length=len(PROMPT) + 2)
    session.prefill([PROMPT], max_new_tokens=100)
    for token in random_tokens(2):
        session.decode(token)
    assert session.is_full.tolist() == [True]


def test_max_length_is_the_model_s_by_default(bundles):
    assert bundles.session("mha").max_length == 512


def test_max_length_is_the_model_s_at_most(bundles):
    load(bundles.path("mha"), max_length=512).close()
    with pytest.raises(
        SettingError, match=r"max_length is 513, the model takes 512 tokens at most .*Leave"
    ):
        load(bundles.path("mha"), max_length=513)


def test_no_message_advises_more_than_the_model_takes(bundles):
    long = np.tile(PROMPT, 60)
    with pytest.raises(CapacityError, match=r"Shorten the prompt: the model takes no longer"):
        bundles.session("mha").prefill([long])
    short = bundles.fresh_session("mha", max_length=len(PROMPT))
    with pytest.raises(CapacityError, match=r"a larger max_length \(512 at most\)"):
        short.prefill([long])
    short.prefill([PROMPT])
    with pytest.raises(CapacityError, match=r"a larger max_length \(512 at most\)"):
        short.decode([5])
    session = bundles.session("mha")
    session.prefill([long[:512]])
    with pytest.raises(
        CapacityError, match=r"is full at 512 tokens\. The model takes no more\.$"
    ):
        session.decode([5])
    with pytest.raises(CapacityError, match=r"has room for 512\. Start anew\.$"):
        session.extend([[5]])


# Further prompts.


@pytest.mark.parametrize("checkpoint", ["mha", "gqa"])
def test_dense_rounds_equal_one_long_prompt(bundles, checkpoint):
    session = bundles.session(checkpoint, policy="none")
    answer, further = random_tokens(5), np.arange(40, 47)
    feed(session, [PROMPT], answer)
    extended = session.extend([further])
    after = session.decode([9])
    long = np.concatenate([PROMPT, answer[:, 0], further])
    assert_close(extended.logits, session.prefill([long], max_new_tokens=4).logits)
    assert_close(after.logits, session.decode([9]).logits)


def test_dense_rounds_of_a_batch_equal_long_prompts(bundles):
    session = bundles.session("mha", policy="none")
    prompts, answer = [PROMPT, PROMPT[:4]], random_tokens(5, batch=2)
    further = [np.arange(40, 47), np.arange(60, 63)]
    feed(session, prompts, answer)
    extended = session.extend(further)
    after = session.decode([9, 10])
    long = [np.concatenate([prompts[i], answer[:, i], further[i]]) for i in range(2)]
    assert_close(extended.logits, session.prefill(long, max_new_tokens=4).logits)
    assert_close(after.logits, session.decode([9, 10]).logits)


@pytest.mark.parametrize("length", [1, 6], ids=["one token", "six tokens"])
def test_a_further_prompt_is_stored_whole_in_all_layers(bundles, length):
    session = bundles.session("mha", policy="random", output_text_keep_rate=1e-9)
    run = feed(session, [IMAGE_PROMPT], random_tokens(5), pixel_values=pixels())
    extended = session.extend([np.arange(20, 20 + length)])
    grown = extended.cache_lengths - run.cache_lengths[-1]
    assert grown[:, 0].tolist() == [length] * 4
    assert extended.kept_image_indices.shape == (1, 0)


def test_two_prompts_equal_one_long_prompt(bundles):
    session = bundles.session("mha")
    further = np.arange(20, 26)
    session.prefill([PROMPT], max_new_tokens=20)
    extended = session.extend([further])
    after = session.decode([9])
    whole = feed(session, [np.concatenate([PROMPT, further])], [[9]])
    assert_close(extended.logits, whole.prefill.logits)
    assert_close(after.logits, whole.logits[0])


def test_a_further_prompt_makes_room_in_the_sparse_caches(bundles):
    session = bundles.session("mha", **TIGHT)
    session.prefill([PROMPT], max_new_tokens=300)
    planned = session.kv_plan.capacities["sparse"]
    keys = session.cache(3)[0][:, :, : len(PROMPT)].copy()
    extended = session.extend([np.tile(PROMPT, 9)])
    assert session.kv_plan.capacities["sparse"] > planned
    assert extended.cache_lengths[:, 0].tolist() == [100] * 4
    assert np.array_equal(session.cache(3)[0][:, :, : len(PROMPT)], keys)
    whole = bundles.session("mha").prefill([np.tile(PROMPT, 10)])
    assert_close(extended.logits, whole.logits)
    steps = [session.decode(token) for token in random_tokens(20)]
    assert any(step.keep[0] for step in steps)
    assert not any(step.forced[0] for step in steps)


@pytest.mark.parametrize("beyond", [0, 1, 2])
def test_a_further_prompt_never_ends_in_the_spare_row(bundles, beyond):
    session = bundles.session("mha", **TIGHT)
    session.prefill([PROMPT], max_new_tokens=300)
    planned = session.kv_plan.capacities["sparse"]
    further = np.arange(3, 3 + planned - 1 + beyond - len(PROMPT))
    extended = session.extend([further])
    assert extended.cache_lengths[:, 0].tolist() == [planned - 1 + beyond] * 4
    assert (session.kv_plan.capacities["sparse"] > planned) == (beyond > 0)


def test_a_further_prompt_of_a_batch_makes_room_for_all(bundles):
    session = bundles.session("mha", **TIGHT)
    session.prefill([PROMPT, PROMPT[:4]], max_new_tokens=300)
    extended = session.extend([np.tile(PROMPT, 9), np.arange(50, 53)])
    assert extended.cache_lengths[3].tolist() == [100, 7]
    session.decode([5, 6])
    alone = bundles.session("mha").prefill([np.append(PROMPT[:4], [50, 51, 52])])
    assert_close(extended.logits[1:], alone.logits)


class RoomyBackend(OrtBackend):
    def allocate(self, plan):
        super().allocate(plan.with_rows("full", plan.capacities["full"] - SPARE_ROWS + 10))


def test_more_cache_rows_than_asked_for_do_not_raise_max_length(bundles):
    session = changed_session(bundles, RoomyBackend, max_length=len(PROMPT) + 1)
    session.prefill([PROMPT])
    assert session.kv_plan.capacities["full"] == len(PROMPT) + 1 + SPARE_ROWS + 10
    assert not session.is_full.any()
    session.decode([5])
    assert session.is_full.tolist() == [True]
    with pytest.raises(CapacityError, match=rf"is full at {len(PROMPT) + 1} tokens"):
        session.decode([5])
    with pytest.raises(CapacityError, match=rf"has room for {len(PROMPT) + 1}\. Start anew"):
        session.extend([[5]])


def test_a_further_prompt_must_fit(bundles):
    session = bundles.session("mha")
    session.prefill([PROMPT], max_new_tokens=5)
    with pytest.raises(
        CapacityError, match=r"has 16 tokens, its KV cache has room for 15\. Start anew"
    ):
        session.extend([PROMPT[:6]])
    assert session.extend([PROMPT[:5]]).cache_lengths[0].tolist() == [15]
    assert session.is_full.tolist() == [True]


# Prompts and images.


def test_the_tokenizer_s_image_token_is_a_placeholder_too(bundles):
    session = changed_session(bundles, image_token_id=130)
    expected = session.prefill([IMAGE_PROMPT], pixels())
    once = np.where(IMAGE_PROMPT == -200, 130, IMAGE_PROMPT)
    repeated = np.repeat(once, np.where(once == 130, 36, 1))
    for ids in (once, repeated):
        assert np.array_equal(session.prefill([ids], pixels()).logits, expected.logits)
        recomputed = session.recompute([ids], pixels())
        assert_close(recomputed.logits, expected.logits)


@pytest.mark.parametrize(
    "input_ids",
    [
        pytest.param(PROMPT[None], id="array"),
        pytest.param([PROMPT.tolist()], id="lists"),
        pytest.param([PROMPT.astype(np.int32)], id="int32"),
    ],
)
def test_prompts_are_arrays_or_lists(bundles, input_ids):
    session = bundles.session("mha")
    expected = session.prefill([PROMPT])
    assert np.array_equal(session.prefill(input_ids).logits, expected.logits)


def test_kept_indices_are_minus_one_without_an_image(bundles):
    session = bundles.session("mha")
    prefill = session.prefill([PROMPT, IMAGE_PROMPT], pixels())
    assert prefill.kept_image_indices[0].tolist() == [-1] * 7
    assert (np.diff(prefill.kept_image_indices[1]) > 0).all()
    assert session.prefill([PROMPT]).kept_image_indices.shape == (1, 0)


def test_image_features_are_cast_to_the_bundle_s_precision(bundles):
    case = load_case("case_1")
    session = bundles.session("mha", "fp16")
    features = case["image_features"]
    prefill = session.prefill(case.input_ids, image_features=features)
    again = session.prefill(case.input_ids, image_features=features.astype(np.float16))
    assert np.array_equal(prefill.logits, again.logits)


NO_IMAGE = (None, None)
ONE_IMAGE = (pixels(), None)


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        pytest.param([], NO_IMAGE, "There is no prompt; expected at least one", id="none"),
        pytest.param([[]], NO_IMAGE, r"Sample 0: the prompt has shape \[0\]", id="empty"),
        pytest.param([[1.0]], NO_IMAGE, r"is float64 of shape \[1\], expected", id="floats"),
        pytest.param([[[1]]], NO_IMAGE, r"is int64 of shape \[1, 1\], expected", id="deep"),
        pytest.param(
            [[5, 131]], NO_IMAGE, "token id 131 at position 1 is not in the vocab", id="id"
        ),
        pytest.param(
            [[-1]], NO_IMAGE, "token id -1 at position 0 is not in", id="negative id"
        ),
        pytest.param(
            [PROMPT], ONE_IMAGE, "Sample 0: there is an image, but no placeholder", id="text"
        ),
        pytest.param(
            [IMAGE_PROMPT],
            NO_IMAGE,
            r"Sample 0: the prompt has 1 image placeholder\(s\), but there is no image",
            id="placeholder only",
        ),
        pytest.param(
            [[-200, 5, -200]],
            ONE_IMAGE,
            r"has 2 image placeholders, at \[0, 2\]; expected 1",
            id="two placeholders",
        ),
        pytest.param(
            [IMAGE_PROMPT, IMAGE_PROMPT],
            ONE_IMAGE,
            "2 of 2 prompts have an image placeholder, but 1 images were given",
            id="one image for two",
        ),
        pytest.param(
            [IMAGE_PROMPT],
            (pixels(2), None),
            "1 of 1 prompts have an image placeholder, but 2 images were given",
            id="two images for one",
        ),
        pytest.param(
            [IMAGE_PROMPT],
            (pixels(size=70), None),
            r"pixel_values has shape \[1, 3, 70, 70\], expected \[num_images, 3, 84, 84\]",
            id="pixel size",
        ),
        pytest.param(
            [IMAGE_PROMPT],
            (pixels()[0], None),
            r"pixel_values has shape \[3, 84, 84\], expected \[num_images",
            id="pixel dimensions",
        ),
        pytest.param(
            [IMAGE_PROMPT],
            (None, np.zeros((1, 35, 64))),
            r"image_features has shape \[1, 35, 64\], expected \[num_images, 36, 64\]",
            id="feature rows",
        ),
        pytest.param(
            [IMAGE_PROMPT],
            (None, np.zeros((36, 64))),
            r"image_features has shape \[36, 64\], expected \[num_images, 36, 64\]",
            id="feature dimensions",
        ),
    ],
)
@pytest.mark.parametrize("method", ["prefill", "recompute"])
def test_refuses_prompts_and_images_that_do_not_fit(bundles, method, prompts, images, message):
    call = getattr(bundles.session("mha"), method)
    with pytest.raises(InvalidInputError, match=message):
        call(prompts, images[0], image_features=images[1])


@pytest.mark.parametrize("method", ["prefill", "recompute"])
def test_refuses_a_prompt_longer_than_max_length(bundles, method):
    session = bundles.fresh_session("mha", max_length=39)
    with pytest.raises(
        CapacityError,
        match=r"has 40 tokens \(36 of them image tokens\), the session has room for 39\. Shorten",
    ):
        getattr(session, method)([IMAGE_PROMPT], pixels())


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        pytest.param([5, 6], r"output_ids has shape \(2,\), expected \[batch, j\]", id="flat"),
        pytest.param([[5], [6]], "is for 2 samples, the prompts are 1", id="samples"),
        pytest.param([[131]], "1 token ids are outside the vocabulary", id="id"),
    ],
)
def test_recompute_refuses_output_ids_that_do_not_fit(bundles, outputs, message):
    with pytest.raises(InvalidInputError, match=message):
        bundles.session("mha").recompute([PROMPT], output_ids=outputs)


@pytest.mark.parametrize(
    ("tokens", "active", "message"),
    [
        pytest.param([5], None, r"shape \(1,\), expected \(2,\): one for each", id="too few"),
        pytest.param([[5, 6]], None, r"shape \(1, 2\), expected \(2,\)", id="dimensions"),
        pytest.param([5, 131], None, "1 token ids are outside the vocabulary", id="id"),
        pytest.param([5, 6], [True], r"active has shape \(1,\), expected \(2,\)", id="active"),
    ],
)
def test_decode_refuses_tokens_that_do_not_fit(bundles, tokens, active, message):
    session = bundles.session("mha")
    session.prefill([PROMPT, PROMPT])
    with pytest.raises(InvalidInputError, match=message):
        session.decode(tokens, active=active)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        pytest.param([PROMPT], "extend got 1 prompts, expected 2", id="samples"),
        pytest.param(
            [PROMPT, IMAGE_PROMPT],
            r"Sample 1: the prompt has 1 image placeholder\(s\), but there is no image",
            id="image",
        ),
        pytest.param([PROMPT, []], r"Sample 1: the prompt has shape \[0\]", id="empty"),
    ],
)
def test_extend_refuses_prompts_that_do_not_fit(bundles, prompts, message):
    session = bundles.session("mha")
    session.prefill([PROMPT, PROMPT])
    with pytest.raises(InvalidInputError, match=message):
        session.extend(prompts)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda session: session.decode([5]), id="decode"),
        pytest.param(lambda session: session.extend([PROMPT]), id="extend"),
        pytest.param(lambda session: session.kv_plan, id="plan"),
        pytest.param(lambda session: session.is_full, id="is full"),
        pytest.param(lambda session: session.cache_lengths, id="lengths"),
        pytest.param(lambda session: session.cache(0), id="cache"),
    ],
)
def test_needs_a_prefill_first(bundles, use):
    with pytest.raises(InvalidInputError, match="There is no cache yet; call prefill first"):
        use(bundles.fresh_session("mha"))


def test_prefill_refuses_a_negative_number_of_tokens(bundles):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        bundles.session("mha").prefill([PROMPT], max_new_tokens=-1)


# What a bundle lacks.


def test_says_so_without_a_tokenizer(bundles):
    with pytest.raises(InvalidInputError, match="has no tokenizer, so it takes token ids"):
        _ = bundles.session("gqa").tokenizer


def test_says_so_without_a_vision_tower(bundles):
    session = changed_session(bundles, has_visual=False)
    with pytest.raises(InvalidInputError, match="has no vision tower and takes no images"):
        session.prefill([IMAGE_PROMPT], pixels())


def test_says_so_without_embeddings(bundles):
    session = changed_session(bundles, embedding=None)
    with pytest.raises(InvalidInputError, match="has no token embeddings, so it cannot take"):
        session.prefill([PROMPT])


def test_eos_token_ids_come_from_the_config_without_a_tokenizer(bundles):
    assert bundles.session("gqa").eos_token_ids == (2,)
    assert bundles.session("mha").eos_token_ids == (2,)


# Loading.


def test_load_refuses_an_unknown_backend(bundles):
    with pytest.raises(
        BackendError,
        match=r"^backend must be one of onnxruntime, tensorrt-rtx, tensorrt, got 'cuda'\. .*"
        "`dllava-export doctor` tells what each one needs",
    ):
        load(bundles.path("mha"), "cuda")


@pytest.mark.parametrize("max_length", [0, -3])
def test_load_refuses_a_length_without_room(bundles, max_length):
    with pytest.raises(ValueError, match=f"max_length must be at least 1, got {max_length}"):
        load(bundles.path("mha"), max_length=max_length)


def test_load_compares_digests_unless_told_not_to(bundles, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.path("mha"), folder)
    config = folder / "llm" / "config.json"
    config.write_text(config.read_text().replace("131", "132"))
    with pytest.raises(BundleError, match=r"config\.json was changed after the bundle was"):
        load(folder)
    assert load(folder, verify=False).manifest.geometry.vocab_size == 131


def test_load_needs_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"has no dllava_export\.json; expected a bundle"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("has_visual", "given", "expected"),
    [
        pytest.param(True, "cat.png", "cat.png", id="a file"),
        pytest.param(True, "none", None, id="text only"),
        pytest.param(False, None, None, id="no vision tower"),
        pytest.param(False, "none", None, id="no vision tower, text only"),
    ],
)
def test_image_choice(bundles, has_visual, given, expected):
    manifest = dataclasses.replace(bundles.session("mha").manifest, has_visual=has_visual)
    assert check_image_choice(manifest, given) == expected


def test_image_choice_must_be_made_where_the_bundle_takes_images(bundles):
    with pytest.raises(
        InvalidInputError, match="takes an image with its prompt, and none was"
    ):
        check_image_choice(bundles.session("mha").manifest, None)
