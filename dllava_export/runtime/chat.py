"""A conversation over several turns, each on top of the caches that the one before left."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export.errors import InvalidInputError
from dllava_export.runtime.generation import (
    ExtendedRun,
    GenerationLoop,
    GenerationSettings,
    Stream,
    prompt_ids,
    start_run,
)
from dllava_export.runtime.results import Generation, ImageInput
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
    any other use of it ends the chat. A new question ends an answer that is still streamed.

    Attributes:
        turns: What was said, oldest first.
    """

    def __init__(self, session: DecodingSession) -> None:
        self._session = session
        self._num_prefills = -1
        self._stream: Stream | None = None
        self.turns: list[Turn] = []

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
        for _ in stream:
            pass
        return stream.result

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
        if self._stream is not None:
            self._stream.close()
        session = self._session
        if not self.turns:
            images = None if image is None else [image]
            ids = prompt_ids(session, [question], images, None)
            # The caches must hold all turns to come: what they do not use costs nothing.
            run = start_run(session, ids, images, _whole_context(session, chosen))
        else:
            if image is not None:
                raise InvalidInputError(
                    "A picture came with a later question; this model takes one with the first "
                    "question. Start a new chat."
                )
            self._check_own_caches()
            run = ExtendedRun(session, self._follow_up(question))

        def note_turn() -> None:
            """A question that was never fed is no turn."""
            self._num_prefills = session.num_prefills
            self.turns.append(Turn(question, loop.results[0]))

        loop = GenerationLoop(session, run, chosen, note_turn)
        self._stream = Stream(loop)
        return self._stream

    def _check_own_caches(self) -> None:
        if self._session.num_prefills != self._num_prefills:
            raise InvalidInputError(
                "The session answered something else since the last question, so its caches "
                "no longer hold this conversation. Start a new chat, or load a second session."
            )

    def _follow_up(self, question: str) -> np.ndarray:
        """Return what is fed next: tokens of the last answer that were not, and the question."""
        answer = self.turns[-1].answer
        rest = np.array(answer.token_ids[answer.num_fed_tokens :], np.int64)
        return np.concatenate([rest, self._session.tokenizer.encode_follow_up(question)])


def _whole_context(
    session: DecodingSession, settings: GenerationSettings
) -> GenerationSettings:
    return dataclasses.replace(settings, max_new_tokens=session.max_length)
