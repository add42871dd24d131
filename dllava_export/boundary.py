"""What leaves the public functions and the command line: errors of this package, nothing else."""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from dllava_export.errors import DllavaExportError, UnexpectedError

__all__ = ["expected_errors_only", "raises_expected_errors_only"]

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def expected_errors_only(
    what: str, *, others: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Let the block raise nothing but errors of this package, and what is no `Exception`.

    Args:
        what: What is done, for the message: `export`.
        others: Further exceptions that pass.

    Raises:
        UnexpectedError: In place of any other exception, which is its cause.
    """
    try:
        yield
    except DllavaExportError:
        raise
    except others:
        raise
    except Exception as error:
        raise UnexpectedError(_message(what, error)) from error


def raises_expected_errors_only(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function or method; see `expected_errors_only`.

    Arguments that do not fit its signature are Python's own TypeError.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def bounded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except DllavaExportError:
            raise
        except Exception as error:
            signature.bind(*args, **kwargs)  # not before: a decode step takes microseconds
            raise UnexpectedError(_message(function.__name__, error)) from error

    return bounded


def _message(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        size = reason or "no size is known"
        return f"{what} ran out of memory: {size}. Use smaller inputs, or more memory."
    if isinstance(error, OSError):
        return (
            f"{what} met {reason}. Check that the file is there, its rights, and free space."
        )
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return (
        f"{what} failed where it should work or say why not: {type(error).__name__}: {reason} "
        f"({place}). Please report it, with the input that led to it."
    )
