"""Logits to the next token: greedy, or by temperature, top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dllava_export.errors import BackendError, SettingError
from dllava_export.settings import real_number, whole_number

__all__ = ["Sampler"]


class Sampler:
    """Chooses the next token of each sample of a batch.

    Each sample draws from a random stream of its own, given by the seed and the sample's
    index, and draws once per token. So its tokens do not depend on which other samples are in
    the batch, nor on when they finish. One sampler serves one generation.

    Args:
        temperature: What logits are divided by, at least 0. At 0 the most likely token is
            taken (the lowest id of several), and the other settings have no effect.
        top_p: In (0, 1]. Tokens are drawn from the fewest most likely ones whose probability
            together reaches `top_p`.
        seed: At least 0. None draws differently in every run.
        top_k: At least 1. Tokens are drawn from so many of the most likely ones, and `top_p`
            is a share of theirs; None for all.
        min_p: In [0, 1]. Tokens with a lower probability than this share of the most likely
            one's are left out.

    Raises:
        SettingError: If a setting is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        top_k: int | None = None,
        min_p: float = 0.0,
    ) -> None:
        if real_number("temperature", temperature) < 0:
            raise SettingError(
                f"temperature must be at least 0 and finite, got {temperature}."
            )
        if not 0 < real_number("top_p", top_p) <= 1:
            raise SettingError(f"top_p must be in (0, 1], got {top_p}.")
        if not 0 <= real_number("min_p", min_p) <= 1:
            raise SettingError(f"min_p must be in [0, 1], got {min_p}.")
        self.temperature = float(temperature)
        self.top_p, self.min_p = float(top_p), float(min_p)
        self.top_k = None if top_k is None else whole_number("top_k", top_k, 1)
        seed = None if seed is None else whole_number("seed", seed, 0)
        self._entropy = np.random.SeedSequence(seed).entropy
        self._streams: dict[int, np.random.Generator] = {}

    def sample(
        self, logits: np.ndarray, sample_indices: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return the next token of each row.

        Args:
            logits: [batch, vocab_size], float32. -inf excludes a token.
            sample_indices: For each row the index of its sample, at least 0; None for
                0, 1, 2 ... Needed where the rows are not all samples of the batch.

        Returns:
            [batch], int64. Token ids.

        Raises:
            SettingError: If the shapes do not fit.
            BackendError: If a row has NaN or +inf, or nothing but -inf.
        """
        logits = np.asarray(logits)
        if logits.ndim != 2 or logits.shape[1] == 0:
            raise SettingError(
                f"logits must have shape [batch, vocab_size], got {list(logits.shape)}."
            )
        indices = range(len(logits)) if sample_indices is None else sample_indices
        if len(indices) != len(logits):
            raise SettingError(
                f"sample_indices must name one sample for each of {len(logits)} rows, got "
                f"{len(indices)}."
            )
        for row, index in zip(logits, indices, strict=True):
            if not np.isfinite(row.max()):
                raise BackendError(
                    f"Logits of sample {index} have {np.isnan(row).sum()} NaN and a maximum "
                    f"of {row.max()}, expected finite values. The model overflowed: use a "
                    "bundle of another precision, float32 to be sure."
                )
        if self.temperature == 0:
            likeliest: np.ndarray = logits.argmax(axis=1).astype(np.int64)
            return likeliest
        return np.array(
            [self._draw(row, index) for row, index in zip(logits, indices, strict=True)],
            np.int64,
        )

    def _draw(self, logits: np.ndarray, sample_index: int) -> int:
        order = np.argsort(-logits, kind="stable")[: self.top_k]
        # The maximum is subtracted first: a tiny temperature then gives -inf, never +inf.
        with np.errstate(over="ignore"):
            scaled = (logits[order].astype(np.float64) - logits.max()) / self.temperature
        weights = np.exp(scaled)  # the most likely token's is 1
        cumulative = np.cumsum(weights)
        cumulative /= cumulative[-1]
        num_candidates = min(
            int(np.searchsorted(cumulative, self.top_p)) + 1,
            int(np.count_nonzero(weights >= self.min_p)),
        )
        candidates = cumulative[:num_candidates]
        drawn = self._stream(sample_index).random() * candidates[-1]
        # The product may round up to the last candidate's bound.
        chosen = min(int(np.searchsorted(candidates, drawn, side="right")), num_candidates - 1)
        return int(order[chosen])

    def _stream(self, sample_index: int) -> np.random.Generator:
        if sample_index not in self._streams:
            seeds = np.random.SeedSequence(self._entropy, spawn_key=(sample_index,))
            self._streams[sample_index] = np.random.default_rng(seeds)
        return self._streams[sample_index]
