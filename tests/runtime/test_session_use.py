"""A session is used by one caller at a time, whatever threads there are."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from dllava_export.errors import InvalidInputError

IDS = np.arange(3, 9)
OTHER_IDS = np.arange(40, 60)
IN_USE = "The session is in the middle of an answer, or of a call from another thread"
WAITS_FOR_ITSELF = "This thread is in the middle of another answer of this session"
LOW_LEVEL = [
    pytest.param(lambda s: s.prefill([IDS]), id="prefill"),
    pytest.param(lambda s: s.decode([5]), id="decode"),
    pytest.param(lambda s: s.extend([[5]]), id="extend"),
    pytest.param(lambda s: s.recompute([IDS]), id="recompute"),
    pytest.param(lambda s: s.encode_images(np.zeros((1, 3, 84, 84))), id="encode images"),
    pytest.param(lambda s: s.fill(3), id="fill"),
    pytest.param(lambda s: s.rewind(s.cache_lengths), id="rewind"),
    pytest.param(lambda s: s.cache(0), id="cache"),
]
ASKING = [
    pytest.param(lambda s: s.generate(input_ids=[IDS], max_new_tokens=3), id="generate"),
    pytest.param(lambda s: next(s.stream(input_ids=IDS)), id="stream"),
    pytest.param(lambda s: s.chat().ask("w5", max_new_tokens=3), id="chat"),
]


def in_thread(function):
    """Run a function in a thread of its own; return its result or the error it raised."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    return found[0]


@pytest.fixture
def session(bundles):
    return bundles.fresh_session("mha")


@pytest.mark.parametrize("mode", ["cache", "recompute"])
def test_two_threads_get_the_answers_that_one_gets(session, mode):
    settings = {"max_new_tokens": 12, "mode": mode}
    prompts = [IDS, OTHER_IDS]
    alone = [session.generate(input_ids=p, **settings).token_ids for p in prompts]
    seen = [[], []]

    def ask(number):
        for _ in range(8):
            answer = session.generate(input_ids=prompts[number], **settings)
            seen[number].append(answer.token_ids)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[alone[0]] * 8, [alone[1]] * 8]


def test_a_second_thread_waits_for_the_whole_answer(session):
    stream = session.stream(input_ids=IDS, max_new_tokens=5)
    next(stream)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(session.generate(input_ids=IDS, max_new_tokens=5))
    )
    thread.start()
    thread.join(timeout=0.2)
    assert thread.is_alive()
    rest = list(stream)
    thread.join(timeout=30)
    assert len(rest) == 4
    assert answers[0].token_ids == stream.result.token_ids


@pytest.mark.parametrize("ask", ASKING)
def test_asking_from_on_token_is_refused(session, ask):
    alone = session.generate(input_ids=IDS, max_new_tokens=4)
    refused = []

    def on_token(*_):
        with pytest.raises(InvalidInputError, match=WAITS_FOR_ITSELF):
            ask(session)
        refused.append(True)

    answer = session.generate(input_ids=IDS, max_new_tokens=4, on_token=on_token)
    assert refused == [True] * 4
    assert answer.token_ids == alone.token_ids


@pytest.mark.parametrize("ask", ASKING)
def test_the_thread_that_iterates_a_stream_cannot_ask_again(session, ask):
    stream = session.stream(input_ids=IDS)
    next(stream)
    with pytest.raises(InvalidInputError, match=WAITS_FOR_ITSELF):
        ask(session)
    stream.close()
    ask(session)


@pytest.mark.parametrize("call", LOW_LEVEL)
def test_calls_in_the_middle_of_an_answer_are_refused(session, call):
    alone = session.generate(input_ids=IDS, max_new_tokens=4)
    stream = session.stream(input_ids=IDS, max_new_tokens=4)
    next(stream)
    with pytest.raises(InvalidInputError, match=IN_USE):
        call(session)
    refused = in_thread(lambda: call(session))
    assert isinstance(refused, InvalidInputError)
    assert IN_USE in str(refused)
    list(stream)
    assert stream.result.token_ids == alone.token_ids
    call(session)


def test_a_call_while_another_thread_is_inside_of_one_is_refused(session):
    with session.use:
        refused = in_thread(lambda: session.prefill([IDS]))
    assert IN_USE in str(refused)


def test_going_on_with_caches_that_another_thread_filled_is_refused(session):
    session.prefill([IDS])
    in_thread(lambda: session.generate(input_ids=OTHER_IDS, max_new_tokens=2))
    with pytest.raises(InvalidInputError, match="Another thread has filled the caches since"):
        session.decode([5])
    session.prefill([IDS])
    session.decode([5])


def test_a_thread_may_go_on_with_what_another_one_prefilled(session):
    session.prefill([IDS])
    first = session.decode([5])
    session.prefill([IDS])
    handed_over = in_thread(lambda: session.decode([5]))
    assert np.array_equal(handed_over.logits, first.logits)


def test_the_pieces_of_a_stream_may_be_taken_by_several_threads(session):
    alone = session.generate(input_ids=IDS, max_new_tokens=6)
    in_thread(lambda: session.prefill([OTHER_IDS]))
    stream = session.stream(input_ids=IDS, max_new_tokens=6)
    taken = [in_thread(lambda: next(stream)).token_id for _ in range(5)]
    taken.append(next(stream).token_id)
    assert taken == alone.token_ids


def test_a_stream_that_is_dropped_lets_the_session_go(session):
    stream = session.stream(input_ids=IDS)
    next(stream)
    del stream
    gc.collect()
    assert len(session.generate(input_ids=IDS, max_new_tokens=2).token_ids) == 2


def test_a_stream_that_was_never_begun_holds_nothing(session):
    stream = session.stream(input_ids=IDS, max_new_tokens=2)
    session.generate(input_ids=IDS, max_new_tokens=2)
    assert len(list(stream)) == 2


def test_closing_a_stream_that_was_never_begun_cancels_it(session):
    stream = session.stream(input_ids=IDS)
    stream.close()
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"


def test_an_error_in_on_token_lets_the_session_go(session):
    def on_token(*_):
        raise KeyError("of the caller's own")

    with pytest.raises(KeyError) as raised:
        session.generate(input_ids=IDS, on_token=on_token)
    assert session.generate(input_ids=IDS, max_new_tokens=2).token_ids
    del raised


def test_another_thread_may_close_a_stream_between_two_pieces(session):
    stream = session.stream(input_ids=IDS)
    next(stream)
    in_thread(stream.close)
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"
    assert len(session.generate(input_ids=IDS, max_new_tokens=2).token_ids) == 2


def test_closing_a_stream_while_its_next_piece_is_computed_ends_it_behind_that(session):
    stream = None

    def cancels(logits, token_ids):
        if len(token_ids) == 3:
            stream.close()

    stream = session.stream(input_ids=IDS, logits_processors=[cancels])
    assert len(list(stream)) == 4
    assert stream.result.finish_reason == "cancelled"


def test_two_threads_cannot_take_pieces_at_once(session):
    refused = []

    def takes_a_piece(logits, token_ids):
        refused.append(in_thread(lambda: next(stream)))

    stream = session.stream(input_ids=IDS, max_new_tokens=1, logits_processors=[takes_a_piece])
    list(stream)
    assert "Another thread is taking the next piece" in str(refused[0])


# After `close`.


@pytest.mark.parametrize("call", [*LOW_LEVEL, *ASKING])
def test_calls_after_close_are_refused(session, call):
    session.prefill([IDS])
    session.close()
    with pytest.raises(InvalidInputError, match="The session is closed"):
        call(session)
    session.close()


def test_closing_a_session_ends_its_streams(session):
    stream = session.stream(input_ids=IDS)
    next(stream)
    in_thread(session.close)
    with pytest.raises(InvalidInputError, match="The session is closed"):
        next(stream)
    assert len(stream.result.token_ids) == 1
    assert stream.result.finish_reason == "error"


def test_whoever_waits_for_a_session_that_is_closed_is_told(session):
    stream = session.stream(input_ids=IDS)
    next(stream)
    refused = []
    thread = threading.Thread(
        target=lambda: refused.append(
            in_thread(lambda: session.generate(input_ids=IDS, max_new_tokens=2))
        )
    )
    thread.start()
    thread.join(timeout=0.1)
    session.close()
    stream.close()
    thread.join(timeout=30)
    assert "The session is closed" in str(refused[0])


# Chats.


def test_two_chats_at_one_session_never_answer_from_each_other_s_caches(session):
    first, second = session.chat(), session.chat()
    first.ask("w5", max_new_tokens=3)
    late = first.stream("w6", max_new_tokens=3)
    second.ask("w7", max_new_tokens=3)
    with pytest.raises(InvalidInputError, match="The session answered something else"):
        next(late)


def test_turns_come_in_the_order_in_which_they_begin(session):
    chat, other = session.chat(), session.chat()
    late, early = chat.stream("w6", max_new_tokens=3), chat.stream("w5", max_new_tokens=3)
    list(early)
    list(late)
    assert [turn.question for turn in chat.turns] == ["w5", "w6"]
    answers = [other.ask(question, max_new_tokens=3).token_ids for question in ("w5", "w6")]
    assert [turn.answer.token_ids for turn in chat.turns] == answers


def test_threads_that_ask_one_chat_wait_for_each_other(session):
    chat, other = session.chat(), session.chat()
    threads = [
        threading.Thread(target=chat.ask, args=(question,), kwargs={"max_new_tokens": 4})
        for question in ("w5", "w6", "w7")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(turn.question for turn in chat.turns) == ["w5", "w6", "w7"]
    for turn in list(chat.turns):
        assert other.ask(turn.question, max_new_tokens=4).token_ids == turn.answer.token_ids


def test_a_question_that_was_refused_leaves_the_chat_as_it_was(session):
    chat = session.chat()
    chat.ask("w5", max_new_tokens=3)
    with pytest.raises(InvalidInputError):
        chat.ask("w6", image=np.zeros((8, 8, 3), np.uint8))
    assert len(chat.turns) == 1
    chat.ask("w6", max_new_tokens=3)
    assert [turn.question for turn in chat.turns] == ["w5", "w6"]
