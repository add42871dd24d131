"""The token embeddings of a bundle, read row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dllava_export.checkpoints.tensor_source import DTYPE_NAMES
from dllava_export.errors import BundleError, InvalidInputError

__all__ = ["EmbeddingTable"]


class EmbeddingTable:
    """Token embeddings, mapped from a file: only the rows looked up are read.

    Attributes:
        rows: [vocab_size, hidden_size], the bundle's precision. The mapped table.
    """

    def __init__(self, folder: Path, reference: Mapping[str, Any]) -> None:
        path = folder / reference["file"]
        dtype = DTYPE_NAMES[reference["dtype"]]
        vocab_size, hidden_size = reference["shape"]
        end = reference["offset"] + vocab_size * hidden_size * dtype.itemsize
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < end:
            found = "is missing" if size is None else f"has {size} bytes"
            raise BundleError(
                f"{path} {found}, expected token embeddings up to byte {end}. Export again."
            )
        shape = vocab_size, hidden_size
        # A plain array over the mapping: np.memmap does work of its own at every lookup.
        self.rows = np.asarray(np.memmap(path, dtype, "r", reference["offset"], shape))

    def lookup(self, ids: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        """Return the embeddings of token ids.

        Args:
            ids: [...], integer.
            dtype: Type of the result; that of the table by default.

        Returns:
            [..., hidden_size], a copy.

        Raises:
            InvalidInputError: If an id is not in [0, vocab_size).
        """
        ids = np.asarray(ids)
        values = ids.ravel().tolist()  # of one id, NumPy's min takes ten times as long
        if values and not 0 <= min(values) <= max(values) < len(self.rows):
            outside = ids[(ids < 0) | (ids >= len(self.rows))]
            raise InvalidInputError(
                f"{outside.size} token ids are outside the vocabulary, the first is "
                f"{outside[0]}; expected 0..{len(self.rows) - 1}. Use this bundle's tokenizer."
            )
        rows = self.rows.take(ids, axis=0)
        return rows if dtype is None else rows.astype(dtype, copy=False)
