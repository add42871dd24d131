from __future__ import annotations

import numpy as np
import pytest

from dllava_export.errors import CapacityError, InvalidInputError
from dllava_export.runtime.results import Piece

QUESTION = "w5 w9"
TEXT_IDS = np.arange(3, 9)
MODES = ["cache", "recompute"]


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)


def untimed(generation):
    return {k: v for k, v in vars(generation).items() if not k.endswith("seconds")}


# What comes out.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("picture", [None, image()], ids=["text", "image"])
def test_pieces_join_to_what_generate_answers(bundles, picture, mode):
    session = bundles.session("mha")
    settings = {"max_new_tokens": 10, "mode": mode}
    expected = session.generate(QUESTION, image=picture, **settings)
    stream = session.stream(QUESTION, image=picture, **settings)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [piece.token_id for piece in pieces] == expected.token_ids
    assert {piece.sample for piece in pieces} == {0}
    assert untimed(stream.result) == untimed(expected)
    assert expected.text
    assert stream.result.prefill_seconds > 0
    assert stream.result.decode_seconds > 0


def test_token_ids_are_answered_too(bundles):
    session = bundles.session("gqa")
    [expected] = session.generate(input_ids=[TEXT_IDS], max_new_tokens=4)
    for ids in (TEXT_IDS, TEXT_IDS.tolist()):
        stream = session.stream(input_ids=ids, max_new_tokens=4)
        assert list(stream) == [Piece("", token) for token in expected.token_ids]
        assert untimed(stream.result) == untimed(expected)


def test_a_picture_goes_with_token_ids(bundles):
    session = bundles.session("mha")
    ids = [1, 5, -200, 9]
    [expected] = session.generate(images=[image()], input_ids=[ids], max_new_tokens=4)
    stream = session.stream(image=image(), input_ids=ids, max_new_tokens=4)
    assert [piece.token_id for piece in stream] == expected.token_ids
    assert stream.result.num_image_tokens == 36


def test_settings_are_those_of_generate(bundles):
    session = bundles.session("mha")
    settings = {"max_new_tokens": 8, "temperature": 2.0, "top_p": 0.9, "seed": 7}
    expected = session.generate(QUESTION, **settings)
    stream = session.stream(QUESTION, **settings)
    assert [piece.token_id for piece in stream] == expected.token_ids
    assert expected.token_ids != session.generate(QUESTION, max_new_tokens=8).token_ids


def test_pieces_come_as_they_are_made(bundles):
    session = bundles.session("mha")
    prompt = session.tokenizer.encode(session.tokenizer.render(QUESTION, with_image=False))
    stream = session.stream(QUESTION, max_new_tokens=10)
    before = session.num_prefills
    for count in range(1, 4):
        piece = next(stream)
        assert stream.result.token_ids[-1] == piece.token_id
        assert len(stream.result.token_ids) == count
        # The token that came last is not fed before the next one is asked for.
        assert session.cache_lengths[0].tolist() == [len(prompt) + count - 1]
    assert session.num_prefills == before + 1


def test_it_ends_once(bundles):
    stream = bundles.session("mha").stream(QUESTION, max_new_tokens=2)
    assert iter(stream) is stream
    assert len(list(stream)) == 2
    assert list(stream) == []


# Ending it early.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_closing_cancels(bundles, mode, count):
    session = bundles.session("mha")
    expected = session.generate(QUESTION, max_new_tokens=10, mode=mode)
    stream = session.stream(QUESTION, max_new_tokens=10, mode=mode)
    pieces = [next(stream) for _ in range(count)]
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.token_ids == expected.token_ids[:count]
    assert stream.result.text == "".join(piece.text for piece in pieces)
    assert list(stream) == []


def test_the_session_can_be_used_after_closing(bundles):
    session = bundles.session("mha")
    expected = session.generate(QUESTION, image=image(), max_new_tokens=8)
    stream = session.stream("w40 w41", max_new_tokens=8)
    next(stream)
    stream.close()
    again = session.generate(QUESTION, image=image(), max_new_tokens=8)
    assert untimed(again) == untimed(expected)
    streamed = session.stream(QUESTION, image=image(), max_new_tokens=8)
    assert "".join(piece.text for piece in streamed) == expected.text


def test_closing_goes_on_with_the_session_s_caches(bundles):
    session = bundles.session("mha")
    expected = session.generate(QUESTION, max_new_tokens=4)
    stream = session.stream(QUESTION, max_new_tokens=8)
    pieces = [next(stream) for _ in range(3)]
    stream.close()
    decoded = session.decode([pieces[-1].token_id])
    assert decoded.logits.argmax() == expected.token_ids[3]


def test_closing_what_has_ended_changes_nothing(bundles):
    stream = bundles.session("mha").stream(QUESTION, max_new_tokens=3)
    assert len(list(stream)) == 3
    for _ in range(2):
        stream.close()
        assert stream.result.finish_reason == "length"


def test_the_last_token_that_was_asked_for_is_no_cancellation(bundles):
    stream = bundles.session("mha").stream(QUESTION, max_new_tokens=3)
    assert [next(stream) for _ in range(3)]
    stream.close()
    assert stream.result.finish_reason == "length"


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({}, "Give either prompts or input_ids, one of the two", id="neither"),
        pytest.param(
            {"prompt": "w5", "input_ids": TEXT_IDS}, "Give either prompts", id="both"
        ),
        pytest.param(
            {"input_ids": TEXT_IDS, "image": image()},
            r"Prompt 0 has no image placeholder \(-200\), but an image was given",
            id="image only",
        ),
        pytest.param(
            {"input_ids": [5, -200]},
            r"Prompt 0 has an image placeholder \(-200\), but no image was given",
            id="placeholder only",
        ),
        pytest.param(
            {"prompt": "<image> w5"}, "contains '<image>'; expected plain", id="written out"
        ),
        pytest.param(
            {"prompt": "w5", "image": "no_such.png"},
            r"Image file no_such\.png does not exist",
            id="image file",
        ),
    ],
)
def test_refuses_at_once_what_does_not_fit(bundles, arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        bundles.session("mha").stream(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "beam"}, "mode must be one of cache, recompute, got 'beam'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"top_p": 2}, r"top_p must be in \(0, 1\], got 2"),
        ({"max_tokens": 5}, "There is no setting 'max_tokens'.*Did you mean 'max_new_tokens'"),
    ],
)
def test_refuses_settings_at_once(bundles, settings, message):
    with pytest.raises(ValueError, match=message):
        bundles.session("mha").stream(QUESTION, **settings)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_is_too_long_shows_when_it_starts(bundles, mode):
    session = bundles.fresh_session("mha", max_length=5)
    stream = session.stream(input_ids=TEXT_IDS, mode=mode)
    with pytest.raises(CapacityError, match=r"has 6 tokens .* the session has room for 5"):
        next(stream)
