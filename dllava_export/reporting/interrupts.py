"""Interrupts: SIGTERM cleans up as Ctrl-C does, and neither is taken for an error of a library."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["interrupts_as_themselves", "terminate_as_exit"]


@contextlib.contextmanager
def terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM end the block by SystemExit, so that what is half written is removed.

    The exit code is 143, as the shell has it for a command that SIGTERM ended. Does nothing
    outside the main thread, or where somebody handles SIGTERM already.
    """
    is_free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread() or not is_free:
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts_as_themselves() -> Iterator[None]:
    """Let an interrupt out of the block as it is, whatever the code inside made of it.

    Libraries that retry, or wrap each error in one of theirs, take Ctrl-C for a failure.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[BaseException] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def noting(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        assert callable(handler)
        try:
            handler(number, frame)
        except BaseException as error:
            caught.append(error)
            raise

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, noting)
    try:
        yield
    except Exception:
        if not caught:
            raise
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)
    if caught:
        raise caught[0]
