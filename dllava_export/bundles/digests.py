"""Digests of a bundle's files: whole ones, made in parallel or while writing, and quick ones.

Up to 256 MiB a digest is the SHA-256 of the file. Above, a file has two: of 64 evenly spread
MiB, which takes no time, and of the whole file, the SHA-256 over the SHA-256 of each 8 MiB
block, so that blocks are digested by several threads.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

__all__ = ["BlockDigest", "DigestingFile", "file_entry", "is_unchanged", "whole_digest"]

_WHOLE_DIGEST_BYTES = 256 << 20
_SAMPLE_BYTES = 1 << 20
_NUM_SAMPLES = 64
_BLOCK_BYTES = 8 << 20
_MAX_WORKERS = 8


class BlockDigest:
    """SHA-256 over the SHA-256 of 8 MiB blocks, which threads digest as they come in.

    Use as a context manager. A few blocks wait in memory at most.
    """

    def __init__(self) -> None:
        self._workers = _num_workers()
        self._pool = ThreadPoolExecutor(self._workers)
        self._pending: collections.deque[Future[bytes]] = collections.deque()
        self._block = bytearray()
        self._digest = hashlib.sha256()

    def __enter__(self) -> BlockDigest:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def update(self, data: bytes) -> None:
        """Go on with these bytes, in pieces of any size."""
        view = memoryview(data)
        while view:
            room = _BLOCK_BYTES - len(self._block)
            if not self._block and len(view) >= room:
                self._submit(view[:room])  # without a copy: bytes do not change
            else:
                self._block += view[:room]
                if len(self._block) == _BLOCK_BYTES:
                    self._submit(self._block)
                    self._block = bytearray()
            view = view[room:]

    def hexdigest(self) -> str:
        """Return the digest of all bytes, in hexadecimal; nothing may follow."""
        if self._block:
            self._submit(self._block)
        while self._pending:
            self._take()
        return self._digest.hexdigest()

    def _submit(self, block: bytearray | memoryview) -> None:
        if len(self._pending) > self._workers:
            self._take()
        self._pending.append(self._pool.submit(_sha256, block))

    def _take(self) -> None:
        self._digest.update(self._pending.popleft().result())


def _sha256(block: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(block).digest()


class DigestingFile:
    """A binary file for writing whose bytes go into a digest as well."""

    def __init__(self, file: IO[bytes], digest: BlockDigest) -> None:
        self._file = file
        self._digest = digest

    def write(self, data: bytes) -> None:
        """Write all of `data`."""
        self._file.write(data)
        self._digest.update(data)

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._file.tell()


def whole_digest(path: Path) -> str:
    """Return the digest over all blocks of a file, as `BlockDigest` makes it."""
    digest = hashlib.sha256()
    starts = range(0, path.stat().st_size, _BLOCK_BYTES)
    with ThreadPoolExecutor(_num_workers()) as pool:
        for block in pool.map(functools.partial(_block_digest, path), starts):
            digest.update(block)
    return digest.hexdigest()


def _num_workers() -> int:
    return min(_MAX_WORKERS, os.cpu_count() or 1)


def _block_digest(path: Path, start: int) -> bytes:
    with path.open("rb") as file:  # buffered: a plain read may give less than there is
        file.seek(start)
        return _sha256(file.read(_BLOCK_BYTES))


def file_entry(path: Path, blocks_sha256: str | None = None) -> dict[str, Any]:
    """Return what a manifest says of a file.

    Args:
        path: The file.
        blocks_sha256: Its `whole_digest`, where it is known.

    Returns:
        `size` in bytes and `sha256`; of files above 256 MiB, `sha256` is that of samples,
        `sampled` is true, and `blocks_sha256` is that of the whole file.
    """
    entry = _quick_entry(path)
    if "sampled" in entry:
        entry["blocks_sha256"] = blocks_sha256 or whole_digest(path)
    return entry


def is_unchanged(path: Path, entry: Mapping[str, Any], *, full: bool) -> bool:
    """Compare a file with what a manifest says of it.

    Args:
        path: The file.
        entry: From `file_entry`. One that 0.1 wrote has samples of large files only.
        full: Compare all bytes of large files, not only samples.
    """
    found = _quick_entry(path)
    if any(found[key] != entry.get(key) for key in found):
        return False
    expected = entry.get("blocks_sha256") if full else None
    return expected is None or whole_digest(path) == expected


def _quick_entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_DIGEST_BYTES:
            while chunk := file.read(_SAMPLE_BYTES):
                digest.update(chunk)
            return {"size": size, "sha256": digest.hexdigest()}
        for number in range(_NUM_SAMPLES):
            file.seek(number * (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return {"size": size, "sha256": digest.hexdigest(), "sampled": True}
