"""Write folders so that one appears under its name only when it is complete.

    .OUT.partial-12345-x7c9w2     while it is written; its process holds a lock on it
    OUT                           when all is on disk

Who dies leaves a partial folder without a lock: the next command that writes OUT removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from dllava_export.errors import BundleError

__all__ = ["new_folder", "replaced_folder"]

_NEW, _PARTIAL, _OLD = "new", "partial", "old"
_NEW_SECONDS = 60  # far more than a folder has that name
_FULL = (errno.ENOSPC, errno.EDQUOT)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def new_folder(out: Path, *, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` if the block ends well, and vanishes if not.

    Args:
        out: A new folder, or an empty one.
        sources: Folders that are read meanwhile: `out` may not lie in one.

    Raises:
        BundleError: If `out` cannot become that folder, another command writes it, or it
            cannot be written.
    """
    out = out.absolute()
    _check_is_free(out, sources)
    advice = "Choose a folder you may write."
    with _partial_folder(out, advice) as partial:
        try:
            yield partial
            _flush(partial)
            partial.rename(out)
            _flush_names(out.parent)
        except OSError as error:
            raise _failure(out, error, "nothing was left behind") from error


@contextlib.contextmanager
def replaced_folder(target: Path, advice: str) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `target` if the block ends well.

    At every moment there is a whole folder under the name, or, where the file system cannot
    exchange two names at once, beside it: the next call brings it back.

    Args:
        target: The folder; an old one is removed when the new one is in its place.
        advice: What to do where it cannot be written, for the message.

    Raises:
        BundleError: If it cannot be written, or another command writes it.
    """
    with _partial_folder(target, advice) as partial:
        try:
            yield partial
            _flush(partial)
            if not target.exists():
                partial.rename(target)
            elif not _exchange(partial, target):
                _replace(partial, target)
            _flush_names(target.parent)
        except OSError as error:
            raise _failure(target, error, "what was there before is still there") from error


def _check_is_free(out: Path, sources: Iterable[Path]) -> None:
    """Say before the work what would make it fail at the end."""
    remedy = "Choose another name"
    if out.is_symlink():
        raise BundleError(
            f"{out} is a symbolic link to {out.readlink()}; expected a new or empty folder. "
            f"{remedy}, or remove the link."
        )
    if out.is_mount():
        raise BundleError(
            f"{out} is a mount point, which no folder can take the place of; expected a new or "
            f"empty folder. {remedy}, {out / 'bundle'} for example."
        )
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise BundleError(
                f"{out} lies in {source}, which it is made from; expected a folder elsewhere. "
                f"{remedy}, {source.resolve().with_name(out.name)} for example."
            )
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise BundleError(
            f"{out} cannot be looked into ({error.strerror}); expected a new or empty folder. "
            f"{remedy}."
        ) from error
    kind = "is a folder with files in it" if out.is_dir() else "is a file"
    raise BundleError(
        f"{out} {kind}; expected a new or empty folder. Choose another name or remove it."
    )


@contextlib.contextmanager
def _partial_folder(out: Path, advice: str) -> Iterator[Path]:
    """Give a locked folder beside `out`, which is removed in the end if it is still there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _tidy(out)
        # Locked before it has the name by which others look for what nobody owns.
        start = f".{out.name}.{_NEW}-{os.getpid()}-"
        made = Path(tempfile.mkdtemp(prefix=start, dir=out.parent))
        made.chmod(0o755)  # mkdtemp makes it private
        lock = _lock(made)
        partial = made.with_name(made.name.replace(f".{_NEW}-", f".{_PARTIAL}-"))
        made.rename(partial)
    except OSError as error:
        found = f"{out.parent} cannot be written ({error.strerror})."
        if error.errno in _FULL:
            advice = "Free some space, or choose another disk."
        raise BundleError(f"{found} {advice}") from error
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _tidy(out: Path) -> None:
    """Remove what commands that died have left of `out`, and bring an old folder back."""
    for left in _left_behind(out, _OLD):
        if out.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(out)
    for left in _left_behind(out, _NEW):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _NEW_SECONDS:
                left.rmdir()
    for left in _left_behind(out, _PARTIAL):
        try:
            lock = _lock(left)
        except BlockingIOError:
            pid = left.name.removeprefix(f".{out.name}.{_PARTIAL}-").split("-")[0]
            raise BundleError(
                f"{out} is being written by another command (process {pid}, in {left.name}). "
                "Wait for it, or choose another name."
            ) from None
        except FileNotFoundError:  # its owner has just finished
            continue
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _left_behind(out: Path, what: str) -> list[Path]:
    start = f".{out.name}.{what}-"
    return sorted(path for path in out.parent.iterdir() if path.name.startswith(start))


def _lock(folder: Path) -> int | None:
    """Lock a folder as long as the descriptor is open; None where there are no such locks.

    Raises:
        BlockingIOError: If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a network file system, perhaps
        os.close(descriptor)
        return None
    return descriptor


def _flush(folder: Path) -> None:
    """Let all of a folder reach the disk: a name must not be there before its contents."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            _flush_names(path)


def _flush_names(path: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    names = os.fsencode(one), os.fsencode(other)
    done = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(done == 0)


def _replace(partial: Path, target: Path) -> None:
    """Replace a folder by two renames; `_tidy` undoes the first if there is no second."""
    old = partial.with_name(partial.name.replace(f".{_PARTIAL}-", f".{_OLD}-"))
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _failure(out: Path, error: OSError, state: str) -> BundleError:
    reason = error.strerror or str(error)
    if error.filename2 is not None and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return BundleError(
            f"Writing {out} failed: another command has written it meanwhile ({reason}). "
            f"Choose another name; {state}."
        )
    where = f" ({error.filename})" if error.filename is not None else ""
    remedy = "Check the rights and the disk, or choose another folder"
    if error.errno in _FULL:
        remedy = "Free some space or choose another disk"
    return BundleError(f"Writing {out} failed: {reason}{where}. {remedy}; {state}.")
