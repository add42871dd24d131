"""What shapes an answer beside the model: stop strings, penalties, processors; what is told."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from dllava_export.errors import BackendError, InvalidInputError, SettingError

IDS = np.arange(3, 9)
QUESTION = "w40 w41"
MODES = ["cache", "recompute"]


@pytest.fixture
def session(bundles):
    """One that never ends an answer by itself, with the tokenizer of words."""
    session = bundles.fresh_session("mha")
    session.manifest = dataclasses.replace(session.manifest, eos_token_ids=())
    return session


def without_end(logits, token_ids):
    logits[:3] = -np.inf


def answer(session, **settings):
    settings = {"max_new_tokens": 8, "logits_processors": [without_end], **settings}
    return session.generate(QUESTION, image=None, **settings)


# Stop strings.


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_ends_before_a_stop_string(session, mode):
    words = answer(session, mode=mode).text.split()
    stop = f"{words[2]} {words[3]}"
    stopped = answer(session, mode=mode, stop=["not there", stop])
    assert stopped.text == f"{words[0]} {words[1]} "
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) == 4


def test_what_may_become_a_stop_string_is_held_back(session):
    words = answer(session).text.split()
    stop = f"{words[2]} {words[3]} and more"
    stream = session.stream(
        QUESTION, image=None, max_new_tokens=4, logits_processors=[without_end], stop=stop
    )
    pieces = list(stream)
    assert [piece.text for piece in pieces] == [
        words[0],
        f" {words[1]}",
        " ",
        "",
        f"{words[2]} {words[3]}",
    ]
    assert [piece.token_id is None for piece in pieces] == [False] * 4 + [True]
    assert stream.result.text == "".join(piece.text for piece in pieces)
    assert stream.result.finish_reason == "length"


def test_a_cancelled_answer_has_the_text_that_was_held_back(session):
    words = answer(session).text.split()
    stream = session.stream(
        QUESTION, image=None, logits_processors=[without_end], stop=f"{words[1]} and more"
    )
    next(stream)
    next(stream)
    stream.close()
    assert stream.result.text == f"{words[0]} {words[1]}"


def test_samples_of_a_batch_stop_by_themselves(session):
    settings = {"max_new_tokens": 8, "logits_processors": [without_end]}
    prompts = [QUESTION, "w7 w8"]
    alone = [session.generate(p, image=None, **settings) for p in prompts]
    stop = alone[0].text.split()[3]
    expected = [session.generate(p, image=None, stop=stop, **settings) for p in prompts]
    together = session.generate(prompts, [None, None], stop=stop, **settings)
    assert [g.text for g in together] == [g.text for g in expected]
    assert [g.token_ids for g in together] == [g.token_ids for g in expected]
    assert together[0].finish_reason == "stop"


def test_a_chat_goes_on_behind_a_stop_string(session):
    chat = session.chat()
    settings = {"max_new_tokens": 8, "logits_processors": [without_end]}
    first = chat.ask(QUESTION, **settings)
    again = session.chat()
    stopped = again.ask(QUESTION, stop=first.text.split()[2], **settings)
    assert stopped.token_ids == first.token_ids[:3]
    assert again.ask("w5", **settings).token_ids
    assert [turn.question for turn in again.turns] == [QUESTION, "w5"]


def test_stop_strings_need_a_tokenizer(bundles):
    with pytest.raises(
        InvalidInputError, match="stop is given as text, and the bundle has no"
    ):
        bundles.session("gqa").generate(input_ids=[IDS], stop="x")


# Choosing tokens.


def test_top_k_of_1_is_greedy(session):
    greedy = answer(session)
    sampled = answer(session, temperature=2.0, top_k=1, seed=1)
    assert sampled.token_ids == greedy.token_ids
    assert answer(session, temperature=2.0, seed=1).token_ids != greedy.token_ids
    assert answer(session, temperature=2.0, min_p=1.0, seed=1).token_ids == greedy.token_ids


@pytest.mark.parametrize("mode", MODES)
def test_a_high_penalty_repeats_nothing_of_prompt_and_answer(session, mode):
    prompt = session.tokenizer.encode(session.tokenizer.render(QUESTION, with_image=False))
    repeated = session.generate(
        QUESTION, image=None, repetition_penalty=1e6, max_new_tokens=20, mode=mode
    )
    assert len(set(repeated.token_ids)) == len(repeated.token_ids)
    assert not set(repeated.token_ids) & set(prompt.tolist())


def test_a_penalty_of_1_changes_nothing(session):
    assert (
        answer(session, repetition_penalty=1.0).token_ids
        == (answer(session, repetition_penalty=1).token_ids)
        == answer(session).token_ids
    )


def test_a_penalty_in_a_chat_counts_all_turns(session):
    chat = session.chat()
    settings = {"max_new_tokens": 6, "repetition_penalty": 1e6}
    first, second = (chat.ask(question, **settings) for question in ("w5", "w6"))
    assert not set(first.token_ids) & set(second.token_ids)


def test_a_processor_sees_each_sample_s_own_tokens(session):
    seen = []

    def notes(logits, token_ids):
        seen.append(tuple(token_ids))
        without_end(logits, token_ids)

    answers = session.generate(
        [QUESTION, "w7"], [None, None], max_new_tokens=3, logits_processors=[notes]
    )
    expected = {tuple(a.token_ids[:n]) for a in answers for n in range(3)}
    assert set(seen) == expected
    assert len(seen) == 6


def test_a_processor_chooses(session):
    def always(logits, token_ids):
        only = np.full_like(logits, -np.inf)
        only[50 + len(token_ids)] = 0
        return only

    assert answer(session, logits_processors=[always]).token_ids == list(range(50, 58))
    sampled = answer(session, logits_processors=[always], temperature=1.0)
    assert sampled.token_ids == list(range(50, 58))


# Logarithms of probabilities.


def test_tells_how_likely_tokens_were(session):
    told = answer(session, top_logprobs=3)
    assert [entry.token_id for entry in told.logprobs] == told.token_ids
    prompt = session.tokenizer.encode(session.tokenizer.render(QUESTION, with_image=False))
    logits = session.prefill([prompt]).logits[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    first = told.logprobs[0]
    assert first.logprob == pytest.approx(expected[first.token_id], abs=1e-5)
    assert list(first.top) == np.argsort(-expected)[:3].tolist()
    assert all(len(entry.top) == 3 for entry in told.logprobs)
    json.dumps(dataclasses.asdict(told))


def test_probabilities_are_those_before_sampling(session):
    plain = answer(session, top_logprobs=2).logprobs[0]
    changed = answer(
        session, top_logprobs=2, temperature=0.5, top_k=1, repetition_penalty=1.5
    ).logprobs[0]
    assert changed.top == plain.top


def test_tells_nothing_unless_asked(session):
    assert answer(session).logprobs == []
    told = answer(session, top_logprobs=0).logprobs
    assert len(told) == 8
    assert told[0].top == {}


# Logits that are not finite.


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_not_finite_end_a_generation_with_an_error(bundles, mode):
    session = bundles.fresh_session("mha")
    runs = []

    def breaks(inner):
        def run(*args, **kwargs):
            outputs = inner(*args, **kwargs)
            runs.append(outputs)
            if len(runs) == 3:
                logits = outputs.logits.copy()
                logits[1, 7] = np.nan
                outputs = dataclasses.replace(outputs, logits=logits)
            return outputs

        return run

    class Overflowing(type(session)):
        prefill = breaks(type(session).prefill)
        decode = breaks(type(session).decode)
        recompute = breaks(type(session).recompute)

    session.__class__ = Overflowing
    prompts = [IDS, IDS[:3]]
    with pytest.raises(BackendError, match="Logits of sample 1 at step 2 have 1 NaN"):
        session.generate(
            input_ids=prompts, mode=mode, max_new_tokens=6, logits_processors=[without_end]
        )
    again = session.generate(input_ids=prompts, mode=mode, max_new_tokens=2)
    assert len(again) == 2


# What is given as prompt.


def test_ids_are_arrays_tensors_or_lists(session):
    expected = session.generate(input_ids=[IDS], max_new_tokens=3)[0].token_ids
    for ids in (IDS[None], torch.tensor(IDS)[None], [IDS.tolist()], [torch.tensor(IDS)]):
        [found] = session.generate(input_ids=ids, max_new_tokens=3)
        assert found.token_ids == expected
    for ids in (IDS, torch.tensor(IDS), IDS.tolist()):
        assert session.generate(input_ids=ids, max_new_tokens=3).token_ids == expected


def test_ids_of_one_prompt_have_one_picture(bundles):
    session = bundles.session("mha")
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    ids = [1, 5, -200, 9]
    [expected] = session.generate(input_ids=[ids], images=[picture], max_new_tokens=3)
    found = session.generate(input_ids=ids, image=picture, max_new_tokens=3)
    assert found.token_ids == expected.token_ids
    with pytest.raises(InvalidInputError, match="One prompt was given with a list"):
        session.generate(input_ids=ids, images=[picture])


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_makes_padded_ids_what_they_are_without(session, mode):
    settings = {"max_new_tokens": 4, "mode": mode}
    prompts = [IDS, IDS[:3]]
    expected = [g.token_ids for g in session.generate(input_ids=prompts, **settings)]
    for side in ("left", "right"):
        padded, mask = np.zeros((2, 8), np.int64), np.zeros((2, 8), np.int64)
        for row, ids in enumerate(prompts):
            place = slice(8 - len(ids), 8) if side == "left" else slice(0, len(ids))
            padded[row, place], mask[row, place] = ids, 1
        found = session.generate(input_ids=padded, attention_mask=mask, **settings)
        assert [g.token_ids for g in found] == expected
    single = session.generate(input_ids=padded[1], attention_mask=mask[1], **settings)
    assert single.token_ids == expected[1]
    streamed = session.stream(input_ids=padded[1], attention_mask=mask[1], **settings)
    assert [piece.token_id for piece in streamed] == expected[1]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda s, ids: s.generate(input_ids=ids), id="generate"),
        pytest.param(lambda s, ids: s.stream(input_ids=ids[0]), id="stream"),
        pytest.param(lambda s, ids: s.prefill(ids), id="prefill"),
        pytest.param(lambda s, ids: s.recompute(ids), id="recompute"),
    ],
)
@pytest.mark.parametrize("ids", [[[0, 5, 6]], [[5, 6, 0, 0]]], ids=["left", "right"])
def test_padded_ids_are_refused_without_a_mask(bundles, call, ids):
    # Without a tokenizer the configuration says what the pad id is: 0.
    with pytest.raises(InvalidInputError, match="the id that stands for padding"):
        call(bundles.session("gqa"), ids)


def test_a_mask_belongs_to_ids(session):
    with pytest.raises(InvalidInputError, match="attention_mask goes with input_ids"):
        session.generate(["w5"], [None], attention_mask=[[1]])


@pytest.mark.parametrize("prompts", [["w5"], "w5"], ids=["list", "one"])
def test_asks_back_where_nothing_was_said_of_pictures(bundles, prompts):
    session = bundles.session("mha")
    with pytest.raises(
        InvalidInputError, match="takes an image with its prompt, and none was"
    ):
        session.generate(prompts)
    with pytest.raises(
        InvalidInputError, match="takes an image with its prompt, and none was"
    ):
        session.stream("w5")


def test_does_not_ask_back_where_no_pictures_are_taken(bundles):
    session = bundles.fresh_session("mha")
    session.manifest = dataclasses.replace(session.manifest, has_visual=False)
    assert session.generate("w5", max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [None], "images": [None]}, "Prompt 0 is NoneType, expected text"),
        ({"prompts": ["w5", b"w6"], "images": [None] * 2}, "Prompt 1 is bytes, expected text"),
        ({"prompts": "\ud800", "image": None}, r"Prompt 0 has '\\ud800' at 0, half of a"),
        ({"prompts": 5, "images": [None]}, "prompts is int, expected a text, or a list"),
        ({"prompts": ["w5"], "images": "cat.png"}, r"images is one str .*, expected a list"),
        ({"input_ids": [["5"]]}, "Sample 0 of input_ids is <U1"),
        ({"input_ids": [[5.0]]}, "Sample 0 of input_ids is float64"),
    ],
)
def test_refuses_what_is_no_prompt(bundles, arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        bundles.session("mha").generate(**arguments)


def test_a_chat_refuses_what_is_no_question(bundles):
    chat = bundles.session("mha").chat()
    with pytest.raises(InvalidInputError, match="The question is NoneType, expected text"):
        chat.ask(None)
    chat.ask("w5", max_new_tokens=1)
    with pytest.raises(InvalidInputError, match=r"The question has .* half of a surrogate"):
        chat.ask("\udfff")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, got None"),
        ({"temperature": None}, "temperature must be a finite number, got None"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
        ({"repetition_penalty": "2"}, "repetition_penalty must be a finite number, got '2'"),
        ({"top_logprobs": -1}, "top_logprobs must be at least 0, got -1"),
        ({"top_logprobs": True}, "top_logprobs must be a whole number, got True"),
        ({"stop": [""]}, r"stop must be a text, or several, none of them empty; got \[''\]"),
        ({"stop": 5}, "stop must be a text, or several, none of them empty; got 5"),
        ({"stop": None}, "stop must be a text, or several, none of them empty; got None"),
        ({"logits_processors": [5]}, "logits_processors must be a list of callables"),
        ({"logits_processors": None}, "logits_processors must be a list of callables"),
        ({"mode": None}, "mode must be one of cache, recompute, got None"),
    ],
)
def test_refuses_settings_of_another_kind(bundles, settings, message):
    with pytest.raises(SettingError, match=message):
        bundles.session("mha").generate(input_ids=[IDS], **settings)


def test_numpy_s_numbers_are_settings_too(session):
    found = session.generate(
        input_ids=IDS, max_new_tokens=np.int32(3), temperature=np.float32(1), seed=np.uint8(1)
    )
    expected = session.generate(input_ids=IDS, max_new_tokens=3, temperature=1, seed=1)
    assert found.token_ids == expected.token_ids
