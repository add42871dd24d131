"""A disk that fills up while large tensors are written; small ones are read as ever."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest

from dllava_export.checkpoints.tensor_source import CHUNK_BYTES, SafetensorsSource
from dllava_export.exporting.weights import MAX_INLINE_BYTES


def fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let half of a large tensor be written, then no more."""
    read = SafetensorsSource.chunks

    def chunks(self: SafetensorsSource, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        if self.num_bytes <= MAX_INLINE_BYTES:
            yield from read(self, max_bytes)
            return
        whole = np.concatenate(list(read(self)))
        yield whole[: len(whole) // 2]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SafetensorsSource, "chunks", chunks)
