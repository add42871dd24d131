from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dllava_export.errors import CapacityError, InvalidInputError
from dllava_export.prompts.tokenizer import StreamDecoder
from dllava_export.runtime.results import Generation

QUESTIONS = ["w5 w9", "w30", "w7 w8 w9 w10"]
IDS = np.array([1, 5, -200, 9, 7])
TEXT_IDS = np.arange(3, 9)
MODES = ["cache", "recompute"]


def image(seed=0, size=(40, 30, 3)):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def greedy(session, ids, images, num_tokens, mode="cache"):
    """The loop written out, for one sample; without an end of sequence."""
    pixels = session.image_processor(images) if images else None
    tokens = []
    logits = session.prefill([ids], pixels).logits if mode == "cache" else None
    while len(tokens) < num_tokens:
        if mode == "recompute":
            logits = session.recompute([ids], pixels, np.array([tokens], np.int64)).logits
        tokens.append(int(logits.argmax()))
        if mode == "cache":
            logits = session.decode(tokens[-1:]).logits
    return tokens


def endless(bundles, checkpoint="mha", **settings):
    """A session without a tokenizer that never ends an answer by itself."""
    session = bundles.fresh_session(checkpoint, **settings)
    session.manifest = dataclasses.replace(
        session.manifest, chat_template=None, eos_token_ids=()
    )
    return session


def with_end(session, *token_ids):
    session.manifest = dataclasses.replace(session.manifest, eos_token_ids=token_ids)
    return session


def counts(generation):
    """Everything but the times."""
    values = dataclasses.asdict(generation)
    return {name: value for name, value in values.items() if not name.endswith("seconds")}


# Greedy.


@pytest.mark.parametrize("mode", MODES)
def test_greedy_equals_the_loop_written_out(bundles, mode):
    session = endless(bundles)
    [answer] = session.generate(
        images=[image()], input_ids=[IDS], max_new_tokens=12, mode=mode
    )
    assert answer.token_ids == greedy(session, IDS, [image()], 12, mode)
    assert answer.finish_reason == "length"


def test_prompts_are_put_in_the_chat_template(bundles):
    session = bundles.session("mha")
    ids = session.tokenizer.encode(session.tokenizer.render(QUESTIONS[0], with_image=True))
    [from_text] = session.generate(QUESTIONS[:1], [image()], max_new_tokens=6)
    [from_ids] = session.generate(images=[image()], input_ids=[ids], max_new_tokens=6)
    assert counts(from_text) == counts(from_ids)
    assert from_text.num_prompt_tokens == len(ids) + 35


def test_text_is_that_of_the_tokens(bundles):
    session = bundles.session("mha")
    [answer] = session.generate(["w40 w41"], [None], max_new_tokens=10)
    words = [f"w{token}" for token in answer.token_ids if token > 2]
    assert answer.text == " ".join(words)
    assert words


def test_both_modes_agree_where_nothing_is_dropped(bundles):
    session = endless(bundles, policy="none")
    answers = [
        session.generate(images=[image()], input_ids=[IDS], max_new_tokens=12, mode=mode)[0]
        for mode in MODES
    ]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("picture", [None, image()], ids=["text", "image"])
def test_one_prompt_gives_one_answer(bundles, picture, mode):
    session = bundles.session("mha")
    settings = {"max_new_tokens": 6, "mode": mode}
    alone = session.generate(QUESTIONS[0], image=picture, **settings)
    [in_a_list] = session.generate([QUESTIONS[0]], [picture], **settings)
    assert counts(alone) == counts(in_a_list)


# Batches.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "images",
    [
        pytest.param([image(0), image(1), image(2)], id="all with images"),
        pytest.param([None, image(1), None], id="one with an image"),
        pytest.param([None, None, None], id="text"),
    ],
)
def test_samples_of_a_batch_are_answered_as_alone(bundles, images, mode):
    session = bundles.session("mha")
    together = session.generate(QUESTIONS, images, max_new_tokens=8, mode=mode)
    for sample, question in enumerate(QUESTIONS):
        own = images[sample : sample + 1]
        [alone] = session.generate([question], own, max_new_tokens=8, mode=mode)
        assert counts(together[sample]) == counts(alone)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_that_ends_early_does_not_disturb_the_other(bundles, mode):
    session = endless(bundles)
    settings = {"max_new_tokens": 12, "mode": mode, "temperature": 3.0, "seed": 4}
    prompts = [TEXT_IDS, IDS]
    images = [None, image()]
    first, second = session.generate(images=images, input_ids=prompts, **settings)
    end = next(
        t for t in first.token_ids[2:] if t not in first.token_ids[:2] + second.token_ids
    )
    ended, unchanged = with_end(session, end).generate(
        images=images, input_ids=prompts, **settings
    )
    assert ended.finish_reason == "stop"
    assert ended.token_ids == first.token_ids[: first.token_ids.index(end)]
    assert ended.num_fed_tokens == len(ended.token_ids)
    assert counts(unchanged) == counts(second)


# Streaming.


def test_streamed_text_joins_to_the_answer(bundles):
    session = bundles.session("mha")
    seen = []
    answers = session.generate(
        QUESTIONS[:2],
        [image(), None],
        max_new_tokens=10,
        on_token=lambda sample, token, text: seen.append((sample, token, text)),
    )
    for sample, answer in enumerate(answers):
        pieces = [entry for entry in seen if entry[0] == sample]
        assert [token for _, token, _ in pieces] == answer.token_ids
        assert "".join(text for _, _, text in pieces) == answer.text
        assert sum(bool(text) for _, _, text in pieces) > 1


def test_text_that_was_held_back_ends_the_answer(bundles, monkeypatch):
    monkeypatch.setattr(StreamDecoder, "flush", lambda decoder: " (rest)")
    [answer] = bundles.session("mha").generate(["w40"], [None], max_new_tokens=2)
    assert answer.text.endswith(" (rest)")


def test_text_is_empty_without_a_tokenizer(bundles):
    seen = []
    [answer] = bundles.session("gqa").generate(
        input_ids=[TEXT_IDS], max_new_tokens=3, on_token=lambda *entry: seen.append(entry)
    )
    assert answer.text == ""
    assert seen == [(0, token, "") for token in answer.token_ids]


# Sampling.


def sampled(session, prompts, seed):
    answers = session.generate(
        input_ids=prompts, max_new_tokens=10, temperature=2.0, top_p=0.9, seed=seed
    )
    return [answer.token_ids for answer in answers]


def test_a_seed_reproduces_the_answer(bundles):
    session = endless(bundles)
    first = sampled(session, [TEXT_IDS], seed=7)
    assert first == sampled(session, [TEXT_IDS], seed=7)
    assert first != sampled(session, [TEXT_IDS], seed=8)


def test_sampling_does_not_depend_on_the_rest_of_the_batch(bundles):
    session = endless(bundles)
    [alone] = sampled(session, [TEXT_IDS], seed=7)
    together = sampled(session, [TEXT_IDS, TEXT_IDS[:2], TEXT_IDS], seed=7)
    assert together[0] == alone
    assert together[2] != alone


# How it ends, and what it counts.


@pytest.mark.parametrize("mode", MODES)
def test_an_end_of_sequence_stops(bundles, mode):
    session = endless(bundles)
    tokens = greedy(session, IDS, [image()], 12, mode)
    place = next(i for i in range(1, 12) if tokens[i] not in tokens[:i])
    with_end(session, 130 if tokens[place] != 130 else 129, tokens[place])
    [answer] = session.generate(
        images=[image()], input_ids=[IDS], max_new_tokens=12, mode=mode
    )
    assert answer.finish_reason == "stop"
    assert answer.token_ids == tokens[:place]
    assert answer.num_fed_tokens == place


@pytest.mark.parametrize("mode", MODES)
def test_an_end_of_sequence_at_once_gives_an_empty_answer(bundles, mode):
    session = endless(bundles)
    with_end(session, *greedy(session, IDS, [image()], 1, mode))
    [answer] = session.generate(images=[image()], input_ids=[IDS], max_new_tokens=5, mode=mode)
    assert (answer.finish_reason, answer.token_ids, answer.num_fed_tokens) == ("stop", [], 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("room", "num_tokens"), [pytest.param(0, 1, id="none"), pytest.param(3, 4, id="three")]
)
def test_a_full_cache_ends_by_length(bundles, mode, room, num_tokens):
    session = endless(bundles, max_length=len(TEXT_IDS) + room)
    [answer] = session.generate(input_ids=[TEXT_IDS], max_new_tokens=50, mode=mode)
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == num_tokens
    assert answer.num_fed_tokens == room


@pytest.mark.parametrize("mode", MODES)
def test_image_tokens_count_towards_the_length(bundles, mode):
    session = endless(bundles, max_length=4 + 36 + 2)
    [answer] = session.generate(
        images=[image()], input_ids=[IDS], max_new_tokens=50, mode=mode
    )
    assert answer.num_fed_tokens == 2


@pytest.mark.parametrize("mode", MODES)
def test_samples_of_a_batch_fill_up_at_their_own_pace(bundles, mode):
    session = endless(bundles, max_length=10)
    prompts = [np.arange(3, 11), np.arange(3, 6)]
    answers = session.generate(input_ids=prompts, max_new_tokens=50, mode=mode)
    assert [len(answer.token_ids) for answer in answers] == [3, 8]
    for prompt, answer in zip(prompts, answers, strict=True):
        [alone] = session.generate(input_ids=[prompt], max_new_tokens=50, mode=mode)
        assert counts(alone) == counts(answer)


@pytest.mark.parametrize("mode", MODES)
def test_counts_prompt_and_image_tokens(bundles, mode):
    session = endless(bundles)
    with_image, text = session.generate(
        images=[image(), None], input_ids=[IDS, TEXT_IDS], max_new_tokens=4, mode=mode
    )
    assert with_image.num_prompt_tokens == 4 + 36
    assert (with_image.num_image_tokens, with_image.num_kept_image_tokens) == (36, 7)
    assert text.num_prompt_tokens == 6
    assert (text.num_image_tokens, text.num_kept_image_tokens) == (0, 0)
    assert with_image.num_fed_tokens == text.num_fed_tokens == 3
    assert with_image.prefill_seconds > 0
    assert with_image.decode_seconds > 0


def test_counts_what_stays_in_the_sparse_caches(bundles):
    session = endless(bundles)
    [answer] = session.generate(images=[image()], input_ids=[IDS], max_new_tokens=25)
    pixels = session.image_processor([image()])
    session.prefill([IDS], pixels)
    steps = [session.decode([token]) for token in answer.token_ids[:-1]]
    assert answer.num_fed_tokens == 24
    assert answer.num_kept_tokens == sum(int(step.keep[0]) for step in steps)
    assert 0 < answer.num_kept_tokens < 24


def test_counts_what_the_last_recompute_pass_kept(bundles):
    session = endless(bundles)
    [answer] = session.generate(
        images=[image()], input_ids=[IDS], max_new_tokens=25, mode="recompute"
    )
    pixels = session.image_processor([image()])
    outputs = np.array([answer.token_ids[:-1]])
    result = session.recompute([IDS], pixels, outputs)
    assert answer.num_kept_tokens == result.num_rows[0] - (4 + 7)
    assert 0 < answer.num_kept_tokens < 24


def test_counts_tokens_that_found_the_sparse_caches_full(bundles):
    session = endless(bundles, output_text_keep_rate=0.01)
    [answer] = session.generate(
        input_ids=[TEXT_IDS], max_new_tokens=200, temperature=2.0, seed=1
    )
    assert answer.num_kept_tokens == session.kv_plan.capacities["sparse"] - 1 - len(TEXT_IDS)
    assert answer.num_forced_drops > 0
    assert f"{answer.num_forced_drops} tokens were dropped because" in answer.to_text()


def test_a_generation_as_text():
    answer = Generation(
        token_ids=[5] * 9,
        finish_reason="stop",
        num_prompt_tokens=640,
        num_image_tokens=576,
        num_kept_image_tokens=115,
        num_fed_tokens=9,
        num_kept_tokens=4,
        prefill_seconds=0.25,
        decode_seconds=0.5,
    )
    assert answer.to_text().splitlines() == [
        "prompt 640 tokens, 115 of 576 image tokens kept; first token after 250 ms",
        "generated 9 tokens (stop), 18.0 tokens/s; KV of 4 of 9 stays in the sparse layers",
    ]


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"mode": "beam"}, "mode must be one of cache, recompute, got", id="mode"),
        pytest.param({"max_new_tokens": 0}, "max_new_tokens must be at least 1", id="tokens"),
        pytest.param({"temperature": -1}, "temperature must be at least 0", id="temperature"),
        pytest.param({"top_p": 0}, r"top_p must be in \(0, 1\], got 0", id="top p"),
        pytest.param({"seed": -1}, "seed must be at least 0, got -1", id="seed"),
    ],
)
def test_refuses_settings_out_of_range(bundles, settings, message):
    with pytest.raises(ValueError, match=message):
        bundles.session("mha").generate(input_ids=[TEXT_IDS], **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({}, "Give either prompts or input_ids, one of the two", id="neither"),
        pytest.param(
            {"prompts": ["w5"], "input_ids": [TEXT_IDS]}, "Give either prompts", id="both"
        ),
        pytest.param(
            {"prompts": "w5", "images": [None]},
            "One prompt was given with a list; its picture is `image`. Pass lists",
            id="one prompt, several images",
        ),
        pytest.param(
            {"prompts": "w5", "input_ids": [TEXT_IDS]},
            "One prompt was given with a list",
            id="one prompt and ids",
        ),
        pytest.param(
            {"prompts": ["w5"], "image": image()},
            "`image` is the picture of a single prompt; with a list of prompts pass `images`",
            id="one image, several prompts",
        ),
        pytest.param(
            {"input_ids": [IDS], "image": image()},
            "`image` is the picture of a single prompt",
            id="one image and ids",
        ),
        pytest.param({"prompts": []}, "There is no prompt; expected at least one", id="empty"),
        pytest.param(
            {"prompts": ["w5", "w6"], "images": [None]},
            "1 images were given for 2 prompts; expected one image, or None, for each",
            id="images for some",
        ),
        pytest.param(
            {"input_ids": [TEXT_IDS], "images": [image()]},
            r"Prompt 0 has no image placeholder \(-200\), but an image was given",
            id="image only",
        ),
        pytest.param(
            {"input_ids": [TEXT_IDS, IDS], "images": [None, None]},
            r"Prompt 1 has an image placeholder \(-200\), but no image was given",
            id="placeholder only",
        ),
        pytest.param(
            {"input_ids": [[-200, -200]], "images": [image()]},
            "has 2 image placeholders",
            id="two placeholders",
        ),
        pytest.param(
            {"input_ids": [[5, 131]]}, "token id 131 at position 1 is not in", id="id"
        ),
        pytest.param(
            {"prompts": ["<image> <image> w5"], "images": [image()]},
            "several places for an image",
            id="two places",
        ),
        pytest.param(
            {"prompts": ["w5"], "images": ["no_such.png"]},
            r"Image file no_such\.png does not exist",
            id="image file",
        ),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_refuses_prompts_and_images_that_do_not_fit(bundles, arguments, message, mode):
    with pytest.raises(InvalidInputError, match=message):
        bundles.session("mha").generate(**arguments, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_refuses_a_prompt_that_is_too_long(bundles, mode):
    session = bundles.fresh_session("mha", max_length=5)
    with pytest.raises(CapacityError, match=r"has 6 tokens .* the session has room for 5"):
        session.generate(input_ids=[TEXT_IDS], mode=mode)


def test_text_needs_a_tokenizer(bundles):
    with pytest.raises(InvalidInputError, match="has no tokenizer, so it takes token ids"):
        bundles.session("gqa").generate(["w5"], [None])
