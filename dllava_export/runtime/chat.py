"""A conversation over several turns, each on top of the caches that the one before left."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export.boundary import raises_expected_errors_only
from dllava_export.errors import InvalidInputError
from dllava_export.prompts.prompt_text import checked_text
from dllava_export.runtime.generation import (
    GenerationLoop,
    GenerationSettings,
    Stream,
)
from dllava_export.runtime.prompting import PromptOptions, prompt_ids
from dllava_export.runtime.results import Generation, ImageInput
from dllava_export.runtime.runs import ExtendedRun, Run, start_run
from dllava_export.settings import settings_from

if TYPE_CHECKING:
    from dllava_export.runtime.decoding import DecodingSession

__all__ = ["Chat", "Turn"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: As it was asked.
        answer: What was generated; it grows while the answer is streamed.
    """

    question: str
    answer: Generation


class Chat:
    """Questions and answers that build on each other; made by `Session.chat`.

    The first turn may bring a picture. Later ones feed their question alone: what was said
    before stays in the caches, pruned as it was. A session holds one conversation at a time:
    any other use of it ends the chat. A new question ends an answer that the same thread still
    streams; one of another thread waits for the answer's end.

    Attributes:
        turns: What was said, oldest first; a turn is there as soon as its question was fed.
    """

    def __init__(self, session: DecodingSession, options: PromptOptions | None = None) -> None:
        self._session = session
        self._history = _History(session, options or PromptOptions())
        self._stream: Stream | None = None
        self.turns = self._history.turns

    def ask(
        self, question: str, image: ImageInput | None = None, **settings: Any
    ) -> Generation:
        """Return the answer to a question.

        Args:
            question: The question.
            image: A picture, with the first question.
            **settings: See `Session.generate`; `mode` is `cache`.

        Raises:
            InvalidInputError: If the session has no tokenizer or was used otherwise, or a
                later question brings a picture.
            CapacityError: If the conversation is too long for the caches.
            SettingError: If a setting is out of range.
        """
        stream = self.stream(question, image, **settings)
        with contextlib.closing(stream):
            for _ in stream:
                pass
        return stream.result

    @raises_expected_errors_only
    def stream(
        self, question: str, image: ImageInput | None = None, **settings: Any
    ) -> Stream:
        """Return the answer to a question as it is generated; see `ask`."""
        chosen = settings_from(GenerationSettings, settings)
        if chosen.mode != "cache":
            raise InvalidInputError(
                f"A chat keeps what was said in the KV cache, but mode is {chosen.mode!r}. Use "
                "session.generate for single questions without a cache."
            )
        if self._stream is not None and self._session.use.is_in_this_thread:
            self._stream.close()
        turn = _TurnRun(self._history, checked_text(question, "The question"), image)
        self._stream = Stream(GenerationLoop(self._session, turn, chosen))
        return self._stream


class _History:
    """What a session's caches hold of a chat.

    Attributes:
        turns: See `Chat`.
    """

    def __init__(self, session: DecodingSession, options: PromptOptions) -> None:
        self._session, self._options = session, options
        self._num_prefills = -1
        self._fed: list[np.ndarray] = []
        self.turns: list[Turn] = []

    @property
    def state(self) -> tuple[int, ...]:
        """What a run that was made depends on: it fits as long as this is the same."""
        fed = [(len(t.answer.token_ids), t.answer.num_fed_tokens) for t in self.turns[-1:]]
        return (self._session.num_prefills, len(self.turns), *sum(fed, ()))

    def run(self, question: str, image: ImageInput | None) -> Run:
        """Return what answers a question as the next one.

        Raises:
            InvalidInputError: If it brings a picture and is not the first, or the caches hold
                something else.
        """
        session = self._session
        if not self.turns:
            images = None if image is None else [image]
            ids = prompt_ids(session, [question], images, options=self._options)
            # The caches must hold all turns to come: what they do not use costs nothing.
            return start_run(session, ids, images, session.max_length)
        if image is not None:
            raise InvalidInputError(
                "A picture came with a later question; this model takes one with the first "
                "question. Start a new chat."
            )
        if session.num_prefills != self._num_prefills:
            raise InvalidInputError(
                "The session answered something else since the last question, so its caches "
                "no longer hold this conversation. Start a new chat, or load a second session."
            )
        answer = self.turns[-1].answer
        # Tokens of the last answer that were not fed come first.
        rest = np.array(answer.token_ids[answer.num_fed_tokens :], np.int64)
        follow_up = session.tokenizer.encode_follow_up(
            question,
            raw=self._options.raw_prompt,
            allow_special=self._options.allow_special,
        )
        return ExtendedRun(session, np.concatenate([rest, follow_up]))

    def note(self, turn: Turn, fed: np.ndarray) -> None:
        """Count a turn whose question is in the caches now.

        Args:
            turn: The turn.
            fed: [t] int64, what was fed for its question.
        """
        self._num_prefills = self._session.num_prefills
        self.turns.append(turn)
        self._fed.append(fed)

    @property
    def token_ids(self) -> np.ndarray:
        """[t] int64, everything that was fed or generated."""
        answers = [np.array(turn.answer.token_ids, np.int64) for turn in self.turns]
        return np.concatenate([*self._fed, *answers])


class _TurnRun(Run):
    """A turn of a chat: what it is fed on top of is known when it begins, not before."""

    batch = 1

    def __init__(
        self,
        history: _History,
        question: str,
        image: ImageInput | None,
    ) -> None:
        self._history, self._question, self._image = history, question, image
        self._state = history.state
        self._run = history.run(question, image)  # what is wrong with it shows at once

    @property
    def prompts(self) -> list[np.ndarray]:
        """See `Run`."""
        return [self._history.token_ids]

    def start(self, results: list[Generation]) -> np.ndarray:
        """Feed the question, behind what is left of the answer before."""
        if self._history.state != self._state:  # an answer went on, or another question came
            self._run = self._history.run(self._question, self._image)
        logits = self._run.start(results)
        (fed,) = self._run.prompts
        self._history.note(Turn(self._question, results[0]), fed)
        return logits

    @property
    def is_full(self) -> np.ndarray:
        """See `Run`."""
        return self._run.is_full

    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
        """Feed a token."""
        return self._run.step(tokens, active, results)
