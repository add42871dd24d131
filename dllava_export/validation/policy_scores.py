"""What the policies without weights score, in NumPy: a second writing of passes/policies.py.

Formulas: `uniform` marks row i of n where floor((i + 1) k / n) > floor(i k / n), `random` is a
quadratic congruence of the position modulo 2^31 - 1, `norm` the length of the hidden state.
"""

from __future__ import annotations

import numpy as np

__all__ = ["score_image_rows", "score_text_rows"]

_PRIME = (1 << 31) - 1
_TEXT_SALT = 1 << 20
_FIXED_POINT = 1 << 20


def score_image_rows(
    policy: str, positions: np.ndarray, hidden_states: np.ndarray, num_kept: int
) -> np.ndarray:
    """Score an image's rows.

    Args:
        policy: `random`, `uniform` or `norm`.
        positions: [n] int64, of the image's rows in the prompt.
        hidden_states: [n, hidden_size] float32, before `sparse_layer`.
        num_kept: Rows that will be kept.

    Returns:
        [n] float32, higher is kept.
    """
    if policy == "random":
        return _hash(positions)
    if policy == "uniform":
        return _evenly_spaced(np.arange(len(positions)), num_kept, len(positions))
    return np.linalg.norm(hidden_states, axis=-1).astype(np.float32)


def score_text_rows(policy: str, positions: np.ndarray, keep_rate: float) -> np.ndarray:
    """Score generated rows.

    Args:
        policy: `random` or `uniform`.
        positions: [n] int64, of the rows in the sequence.
        keep_rate: Share to keep, in (0, 1).

    Returns:
        [n] float32, above 0 where the row is kept.
    """
    if policy == "random":
        return np.float32(keep_rate) - _hash(positions + _TEXT_SALT)
    return _evenly_spaced(positions, round(keep_rate * _FIXED_POINT), _FIXED_POINT)


def _hash(positions: np.ndarray) -> np.ndarray:
    """Return numbers in [0, 1), float32, one per position."""
    found = []
    for position in positions.tolist():  # Python's integers cannot overflow
        x = position + 1
        found.append((((48271 * x + 1103515245) % _PRIME) * x + 12345) % _PRIME)
    return np.array(found, np.int64).astype(np.float32) / np.float32(_PRIME)


def _evenly_spaced(index: np.ndarray, num_kept: int, total: int) -> np.ndarray:
    return ((index + 1) * num_kept // total - index * num_kept // total).astype(np.float32)
