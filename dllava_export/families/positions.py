"""Position rules: where a token stands in its sequence. A position is not a cache row."""

from __future__ import annotations

from typing import Protocol

import numpy as np

__all__ = ["PositionRule", "SequentialPositions"]


class PositionRule(Protocol):
    """How a family numbers the rows of a prompt, and what is generated behind it."""

    def prompt(self, token_kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number the rows of a right-padded batch of prompts.

        Args:
            token_kind: [batch, rows] int64, see `names`.

        Returns:
            position_ids [batch, rows] int64; [batch] int64, the position of the token that
            follows each prompt. Later tokens follow one by one.
        """
        ...


class SequentialPositions:
    """Rows count from 0 on, image rows like text: LLaVA's rule."""

    def prompt(self, token_kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return 0, 1, 2, ... for each sample, and its number of valid rows."""
        rows = np.arange(token_kind.shape[1], dtype=np.int64)
        positions = np.ascontiguousarray(np.broadcast_to(rows, token_kind.shape))
        return positions, (token_kind != 0).sum(1, dtype=np.int64)
