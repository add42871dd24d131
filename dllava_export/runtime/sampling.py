"""Logits to the next token: greedy, or by temperature and top-p."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dllava_export.errors import BackendError, SettingError

__all__ = ["Sampler"]


class Sampler:
    """Chooses the next token of each sample of a batch.

    Each sample draws from a random stream of its own, given by the seed and the sample's
    index, and draws once per token. So its tokens do not depend on which other samples are in
    the batch, nor on when they finish. One sampler serves one generation.

    Args:
        temperature: What logits are divided by, at least 0. At 0 the most likely token is
            taken (the lowest id of several), and `top_p` and `seed` have no effect.
        top_p: In (0, 1]. Tokens are drawn from the fewest most likely ones whose probability
            together reaches `top_p`.
        seed: At least 0. None draws differently in every run.

    Raises:
        SettingError: If a setting is out of range.
    """

    def __init__(
        self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None
    ) -> None:
        if not (np.isfinite(temperature) and temperature >= 0):
            raise SettingError(
                f"temperature must be at least 0 and finite, got {temperature}."
            )
        if not 0 < top_p <= 1:
            raise SettingError(f"top_p must be in (0, 1], got {top_p}.")
        if seed is not None and seed < 0:
            raise SettingError(f"seed must be at least 0, got {seed}.")
        self.temperature = temperature
        self.top_p = top_p
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
        order = np.argsort(-logits, kind="stable")
        # The maximum is subtracted first: a tiny temperature then gives -inf, never +inf.
        with np.errstate(over="ignore"):
            scaled = (logits[order].astype(np.float64) - logits.max()) / self.temperature
        cumulative = np.cumsum(np.exp(scaled))
        cumulative /= cumulative[-1]
        num_candidates = int(np.searchsorted(cumulative, self.top_p)) + 1
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
