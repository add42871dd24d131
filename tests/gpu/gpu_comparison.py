"""Feed two sessions the same prompt and tokens, and say how far apart they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dllava_export.errors import BackendError
from dllava_export.runtime.session import Session

__all__ = ["LIMITS", "Limits", "Prompt", "Trace", "compare", "trace"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What counts as equal.

    Attributes:
        num_flips: Kept image rows, and keep bits, that may differ.
        max_abs: Largest difference of logits while nothing has flipped yet.
        cosine: Smallest cosine of logits, flips or not.
    """

    num_flips: int
    max_abs: float
    cosine: float


LIMITS = {
    # A GPU sums in another order; TF32 is off.
    "fp32": Limits(num_flips=0, max_abs=2e-3, cosine=0.9999),
    # Scores within 1e-2 may change places in 11 bits; logits are up to 7.
    "fp16": Limits(num_flips=2, max_abs=5e-2, cosine=0.995),
    # 8 bits.
    "bf16": Limits(num_flips=4, max_abs=4e-1, cosine=0.98),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One batch of prompts and the tokens that follow, whatever the logits say.

    Attributes:
        input_ids: [batch, t] int64, -200 for the image.
        images: Keyword arguments of `Session.prefill`: `pixel_values` or `image_features`.
        tokens: [steps, batch] int64.
        recompute_lengths: Generated tokens at which the pass without a cache is compared.
    """

    input_ids: np.ndarray
    images: Mapping[str, np.ndarray]
    tokens: np.ndarray
    recompute_lengths: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a session makes of a prompt.

    Attributes:
        kept: [batch, k] int64, kept image rows.
        keep: [steps, batch] bool.
        lengths: [steps + 1, layers, batch] int64, cache lengths.
        logits: [steps + 1, batch, vocab_size] float32, of prefill and each step.
        recomputed: [lengths, batch, vocab_size] float32; None where it cannot be run.
        no_recompute: Why it cannot.
    """

    kept: np.ndarray
    keep: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray
    recomputed: np.ndarray | None
    no_recompute: str


def trace(session: Session, prompt: Prompt) -> Trace:
    """Prefill, decode and recompute."""
    first = session.prefill(
        prompt.input_ids, **prompt.images, max_new_tokens=len(prompt.tokens)
    )
    steps = [session.decode(row) for row in prompt.tokens]
    recomputed, reason = None, ""
    try:
        recomputed = np.stack(
            [
                session.recompute(
                    prompt.input_ids, output_ids=prompt.tokens[:length].T, **prompt.images
                ).logits
                for length in prompt.recompute_lengths
            ]
        )
    except BackendError as error:
        reason = str(error)
    return Trace(
        first.kept_image_indices,
        np.stack([step.keep for step in steps]),
        np.stack([first.cache_lengths, *(step.cache_lengths for step in steps)]),
        np.stack([first.logits, *(step.logits for step in steps)]),
        recomputed,
        reason,
    )


def compare(found: Trace, expected: Trace, limits: Limits) -> tuple[bool, dict[str, Any]]:
    """Return whether two traces agree, and figures."""
    num_kept = sum(
        len(np.setdiff1d(*pair)) for pair in zip(found.kept, expected.kept, strict=True)
    )
    flips = found.keep != expected.keep
    first_flip = int(np.argmax(flips.any(axis=1))) if flips.any() else len(flips)
    unflipped = 0 if num_kept else first_flip + 1  # logits of the flipping step are unaffected
    difference = np.abs(found.logits - expected.logits)
    figures = {
        "kept rows differing": num_kept,
        "keep bits differing": int(flips.sum()),
        "cache lengths": "equal"
        if np.array_equal(found.lengths, expected.lengths)
        else "differ",
        "max abs": float(difference[:unflipped].max(initial=0.0)),
        "cosine": _cosine(found.logits, expected.logits),
    }
    passed = (
        num_kept <= limits.num_flips
        and figures["keep bits differing"] <= limits.num_flips
        and figures["max abs"] <= limits.max_abs
        and figures["cosine"] >= limits.cosine
    )
    if not num_kept and not flips.any():
        passed &= figures["cache lengths"] == "equal"
    if found.recomputed is not None and expected.recomputed is not None:
        figures["recompute cosine"] = _cosine(found.recomputed, expected.recomputed)
        passed &= figures["recompute cosine"] >= limits.cosine
    return bool(passed), figures


def _cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the smallest cosine over the last axis."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    cosines = (found * expected).sum(axis=-1) / np.maximum(norms, 1e-30)
    return float(np.nan_to_num(cosines, nan=-1.0).min())
