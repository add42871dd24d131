"""Who uses a session: one generation, or one call, at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from dllava_export.errors import InvalidInputError

__all__ = ["SessionUse"]


class SessionUse:
    """Lets one caller at a time use a session's caches and graphs.

    A generation holds the session from its first token to its end, whatever thread asks for
    the tokens, and a second one waits. Calls that are not part of it are refused meanwhile:
    they would change the caches it goes on with.

    Used as a context, it is one call: `prefill`, `decode` and the like.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()  # of a generation, or of a call outside of any
        self._running = threading.Lock()  # while graphs run: what `close` waits for
        self._generating_thread: int | None = None
        self._running_thread: int | None = None
        self._is_single_call = False
        self._is_closed = False
        self._num_fillings = 0
        self._seen_fillings = threading.local()

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Hold the session for a generation; wait until whoever has it is done.

        Raises:
            InvalidInputError: If the thread itself is in the middle of one, or the session is
                closed.
        """
        self.check_open()
        if self.is_in_this_thread:
            raise InvalidInputError(
                "This thread is in the middle of another answer of this session, which one "
                "caller uses at a time: the call would wait for itself. Iterate to the end of "
                "the stream or close it first, do not ask from on_token, or load a second "
                "session."
            )
        with self._turn:
            self.check_open()
            self.go_on()
            try:
                yield
            finally:
                self._generating_thread = None

    @property
    def is_in_this_thread(self) -> bool:
        """Whether the running thread is in the middle of a generation."""
        return self._generating_thread == threading.get_ident()

    def go_on(self) -> None:
        """Note that the generation is in the hands of the running thread now."""
        self._generating_thread = threading.get_ident()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Let the generation that holds the session use it: calls inside belong to it."""
        with self._running:
            self.check_open()
            self._running_thread = threading.get_ident()
            try:
                yield
            finally:
                self._running_thread = None

    def __enter__(self) -> None:
        if self._running_thread == threading.get_ident():
            return  # part of a step
        if not self._turn.acquire(blocking=False):
            raise InvalidInputError(
                "The session is in the middle of an answer, or of a call from another thread; "
                "expected one caller at a time. Wait for its end, close the stream, or load a "
                "second session."
            )
        self._running.acquire()
        self._running_thread = threading.get_ident()
        self._is_single_call = True
        if self._is_closed:
            self.__exit__()
            self.check_open()

    def __exit__(self, *_: object) -> None:
        if self._is_single_call:
            self._is_single_call = False
            self._running_thread = None
            self._running.release()
            self._turn.release()

    def note_filled(self) -> None:
        """Note that the caches were filled anew, for the running thread."""
        self._num_fillings += 1
        self._seen_fillings.number = self._num_fillings

    def check_filled_here(self) -> None:
        """Refuse to go on with caches that another thread has filled since this one did.

        Raises:
            InvalidInputError: If that is so.
        """
        if not self._is_single_call:
            return  # a generation holds the session, whatever thread it is in
        seen = getattr(self._seen_fillings, "number", self._num_fillings)
        if seen != self._num_fillings:
            raise InvalidInputError(
                "Another thread has filled the caches since this one's prefill. Prefill again, "
                "or load a session for each thread."
            )

    def check_open(self) -> None:
        """Refuse what comes after `close`.

        Raises:
            InvalidInputError: If the session is closed.
        """
        if self._is_closed:
            raise InvalidInputError("The session is closed. Load the bundle again.")

    @contextlib.contextmanager
    def closing(self) -> Iterator[bool]:
        """Close, once nothing runs; true where it was open until now."""
        with self._running:
            was_open, self._is_closed = not self._is_closed, True
            yield was_open
