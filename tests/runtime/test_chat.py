from __future__ import annotations

import io

import numpy as np
import pytest
import tolerances
from PIL import Image

from dllava_export.errors import CapacityError, InvalidInputError

QUESTIONS = ("w5 w9", "w30", "w7 w8 w9")
COUNTS = (6, 4, 5)


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)


def by_hand(session, picture, token_ids):
    """Feed a conversation by prefill, decode and extend; return the logits behind each answer.

    Args:
        picture: Of the first question.
        token_ids: Of each answer but the last, as the chat gave them; all but the last token
            of each are fed one by one, the last one with the next question.
    """
    tokenizer = session.tokenizer
    ids = tokenizer.encode(tokenizer.render(QUESTIONS[0], with_image=picture is not None))
    pixels = None if picture is None else session.image_processor([picture])
    logits = [session.prefill([ids], pixels).logits]
    for question, answer in zip(QUESTIONS[1:], token_ids, strict=False):
        logits += [session.decode([token]).logits for token in answer[:-1]]
        follow_up = [answer[-1], *tokenizer.encode_follow_up(question)]
        logits.append(session.extend([follow_up]).logits)
    return logits


def greedy(session, logits, count):
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(session.decode(tokens[-1:]).logits.argmax()))
    return tokens


@pytest.fixture(params=[{}, {"policy": "none"}], ids=["sparse", "dense"])
def session(bundles, request):
    return bundles.fresh_session("mha", **request.param)


@pytest.fixture
def endless(session, monkeypatch):
    """A session that never ends an answer by itself."""
    monkeypatch.setattr(type(session), "eos_token_ids", ())
    return session


# Turns.


@pytest.mark.parametrize("picture", [None, image()], ids=["text", "image"])
def test_turns_equal_prefill_and_extend_by_hand(endless, picture):
    chat = endless.chat()
    for turn, (question, count) in enumerate(zip(QUESTIONS, COUNTS, strict=True)):
        answer = chat.ask(question, picture if turn == 0 else None, max_new_tokens=count)
        assert len(answer.token_ids) == count
        assert answer.finish_reason == "length"
    lengths = endless.cache_lengths
    answers = [turn.answer.token_ids for turn in chat.turns]
    assert [turn.question for turn in chat.turns] == list(QUESTIONS)
    assert endless.num_prefills == 1

    for turn in range(len(QUESTIONS)):
        logits = by_hand(endless, picture, answers[:turn])[-1]
        assert answers[turn] == greedy(endless, logits, COUNTS[turn])
    assert endless.cache_lengths.tolist() == lengths.tolist()


def test_a_dense_chat_equals_one_long_prompt(bundles, monkeypatch):
    session = bundles.fresh_session("mha", policy="none")
    monkeypatch.setattr(type(session), "eos_token_ids", ())
    chat, tokenizer = session.chat(), session.tokenizer
    ids = tokenizer.encode(tokenizer.render(QUESTIONS[0], with_image=False))
    for question, count in zip(QUESTIONS, COUNTS, strict=True):
        if chat.turns:
            ids = np.append(ids, chat.turns[-1].answer.token_ids)
            ids = np.append(ids, tokenizer.encode_follow_up(question))
        answer = chat.ask(question, max_new_tokens=count)
        logits = bundles.session("mha", policy="none").recompute([ids]).logits
        assert answer.token_ids[0] == logits.argmax()
    np.testing.assert_allclose(
        session.decode(answer.token_ids[-1:]).logits,
        session.recompute([np.append(ids, answer.token_ids)]).logits,
        rtol=0,
        atol=tolerances.SAME_MODEL,
    )


def test_an_answer_that_ended_by_itself_is_fed_whole(session, monkeypatch):
    monkeypatch.setattr(type(session), "eos_token_ids", ())
    tokens = session.chat().ask(QUESTIONS[0], max_new_tokens=8).token_ids
    place = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(type(session), "eos_token_ids", (tokens[place],))
    chat = session.chat()
    first = chat.ask(QUESTIONS[0], max_new_tokens=8)
    assert (first.finish_reason, first.token_ids) == ("stop", tokens[:place])
    second = chat.ask(QUESTIONS[1], max_new_tokens=1)

    tokenizer = session.tokenizer
    session.prefill([tokenizer.encode(tokenizer.render(QUESTIONS[0], with_image=False))])
    for token in tokens[:place]:
        session.decode([token])
    logits = session.extend([tokenizer.encode_follow_up(QUESTIONS[1])]).logits
    assert (second.token_ids or list(session.eos_token_ids)) == [logits.argmax()]
    assert second.num_prompt_tokens == len(tokenizer.encode_follow_up(QUESTIONS[1]))


def test_the_first_turn_is_what_generate_answers(session):
    chat = session.chat()
    answer = chat.ask(QUESTIONS[0], image(), max_new_tokens=6)
    expected = session.generate(QUESTIONS[0], image=image(), max_new_tokens=6)
    assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
    assert answer.num_image_tokens == 36


def test_a_chat_streams(endless):
    asked, streamed = endless.chat(), endless.chat()
    expected = [asked.ask(question, max_new_tokens=4) for question in QUESTIONS]
    for question, answer in zip(QUESTIONS, expected, strict=True):
        stream = streamed.stream(question, max_new_tokens=4)
        assert "".join(piece.text for piece in stream) == answer.text
        assert stream.result is streamed.turns[-1].answer
        assert stream.result.token_ids == answer.token_ids


def test_a_turn_grows_while_it_is_streamed(endless):
    chat = endless.chat()
    stream = chat.stream(QUESTIONS[0], max_new_tokens=4)
    for count, _ in enumerate(stream, start=1):
        assert len(chat.turns[0].answer.token_ids) == count


@pytest.mark.parametrize("count", [1, 3])
def test_a_chat_goes_on_behind_a_cancelled_answer(endless, count):
    chat = endless.chat()
    stream = chat.stream(QUESTIONS[0], max_new_tokens=20)
    tokens = [next(stream).token_id for _ in range(count)]
    stream.close()
    assert chat.turns[0].answer.finish_reason == "cancelled"
    answer = chat.ask(QUESTIONS[1], max_new_tokens=4)
    logits = by_hand(endless, None, [tokens])[-1]
    assert answer.token_ids == greedy(endless, logits, 4)


def test_a_new_question_ends_the_answer_before(endless):
    chat = endless.chat()
    stream = chat.stream(QUESTIONS[0], max_new_tokens=20)
    tokens = [next(stream).token_id for _ in range(3)]
    answer = chat.ask(QUESTIONS[1], max_new_tokens=4)
    assert list(stream) == []
    assert chat.turns[0].answer.finish_reason == "cancelled"
    logits = by_hand(endless, None, [tokens])[-1]
    assert answer.token_ids == greedy(endless, logits, 4)


def test_what_was_never_fed_is_no_turn(endless):
    chat = endless.chat()
    chat.stream(QUESTIONS[2], max_new_tokens=4).close()
    assert chat.turns == []
    first = chat.ask(QUESTIONS[0], max_new_tokens=4)
    chat.stream(QUESTIONS[2], max_new_tokens=4).close()
    assert [turn.question for turn in chat.turns] == [QUESTIONS[0]]
    answer = chat.ask(QUESTIONS[1], max_new_tokens=4)
    logits = by_hand(endless, None, [first.token_ids])[-1]
    assert answer.token_ids == greedy(endless, logits, 4)


def test_chats_after_each_other(endless):
    answers = []
    for _ in range(2):
        chat = endless.chat()
        answers.append([chat.ask(q, max_new_tokens=4).token_ids for q in QUESTIONS])
    assert answers[0] == answers[1]


def test_later_turns_find_room_in_the_sparse_caches(bundles, monkeypatch):
    session = bundles.fresh_session("mha", output_text_keep_rate=0.01)
    monkeypatch.setattr(type(session), "eos_token_ids", ())
    chat = session.chat()
    for question in ("w5", " ".join(["w9"] * 90), "w6"):
        chat.ask(question, max_new_tokens=2)
    assert session.cache_lengths[3, 0] > 90
    assert not any(turn.answer.num_forced_drops for turn in chat.turns)


# What is refused.


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(
            lambda session: session.generate("w5", image=None, max_new_tokens=2), id="generate"
        ),
        pytest.param(lambda session: session.prefill([[5, 6]]), id="prefill"),
        pytest.param(lambda session: session.chat().ask("w5", max_new_tokens=2), id="chat"),
    ],
)
def test_another_use_of_the_session_ends_the_chat(session, use):
    chat = session.chat()
    chat.ask(QUESTIONS[0], max_new_tokens=2)
    use(session)
    with pytest.raises(
        InvalidInputError, match=r"answered something else .* Start a new chat, or load"
    ):
        chat.ask(QUESTIONS[1], max_new_tokens=2)
    assert len(chat.turns) == 1


def test_a_pass_without_caches_does_not_end_the_chat(endless):
    chat = endless.chat()
    first = chat.ask(QUESTIONS[0], max_new_tokens=3)
    endless.generate("w60", image=None, max_new_tokens=2, mode="recompute")
    answer = chat.ask(QUESTIONS[1], max_new_tokens=4)
    logits = by_hand(endless, None, [first.token_ids])[-1]
    assert answer.token_ids == greedy(endless, logits, 4)


def test_a_picture_belongs_to_the_first_question(session):
    chat = session.chat()
    chat.ask(QUESTIONS[0], image(), max_new_tokens=2)
    with pytest.raises(InvalidInputError, match=r"one with the first question\. Start a new"):
        chat.ask(QUESTIONS[1], image(), max_new_tokens=2)
    assert len(chat.turns) == 1
    chat.ask(QUESTIONS[1], max_new_tokens=2)


def test_needs_its_caches(session):
    chat = session.chat()
    with pytest.raises(InvalidInputError, match="in the KV cache, but mode is 'recompute'"):
        chat.ask(QUESTIONS[0], mode="recompute")
    assert chat.turns == []


def test_refuses_settings_out_of_range(session):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        session.chat().ask(QUESTIONS[0], max_new_tokens=0)


def test_needs_a_tokenizer(bundles):
    with pytest.raises(InvalidInputError, match="has no tokenizer"):
        bundles.session("gqa").chat().ask(QUESTIONS[0])


def test_a_first_question_that_does_not_fit_may_be_asked_shorter(bundles, monkeypatch):
    session = bundles.fresh_session("mha", max_length=60)
    monkeypatch.setattr(type(session), "eos_token_ids", ())
    chat = session.chat()
    with pytest.raises(CapacityError, match="the session has room for 60"):
        chat.ask(" ".join(["w9"] * 90), max_new_tokens=2)
    assert chat.turns == []
    answer = chat.ask(QUESTIONS[0], max_new_tokens=2)
    assert (
        answer.token_ids
        == session.generate(QUESTIONS[0], image=None, max_new_tokens=2).token_ids
    )


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(bundles, monkeypatch):
    session = bundles.fresh_session("mha", max_length=120)
    monkeypatch.setattr(type(session), "eos_token_ids", ())
    chat = session.chat()
    first = chat.ask(QUESTIONS[0], max_new_tokens=4)
    with pytest.raises(CapacityError, match="its KV cache has room for 120"):
        chat.ask(" ".join(["w9"] * 120), max_new_tokens=2)
    assert [turn.question for turn in chat.turns] == [QUESTIONS[0]]
    answer = chat.ask(QUESTIONS[1], max_new_tokens=4)
    logits = by_hand(session, None, [first.token_ids])[-1]
    assert answer.token_ids == greedy(session, logits, 4)


def test_a_picture_is_read_once(bundles):
    class Picture(io.BytesIO):
        num_reads = 0

        def read(self, *size):
            self.num_reads += 1
            return super().read(*size)

    data = io.BytesIO()
    Image.fromarray(image()).save(data, "PNG")
    picture = Picture(data.getvalue())
    bundles.session("mha").chat().ask(QUESTIONS[0], picture, max_new_tokens=2)
    assert picture.num_reads == 1
