"""What is done to a model's logits before a token is chosen, and what is told about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dllava_export.errors import BackendError, InvalidInputError
from dllava_export.prompts.token_ids import as_array
from dllava_export.runtime.results import TokenLogprob

__all__ = ["LogitsProcessor", "check_finite", "penalised", "processed", "token_logprob"]

LogitsProcessor = Callable[[np.ndarray, list[int]], Any]
"""Called with ([vocab_size] float32 logits, tokens generated so far); returns new logits, or None
where it wrote into those it got. -inf excludes a token."""


def check_finite(logits: np.ndarray, sample: int, step: int) -> None:
    """Refuse logits that a model never gives unless it overflowed.

    Args:
        logits: [vocab_size] float32.
        sample: Of the batch, for the message.
        step: Tokens generated before, for the message.

    Raises:
        BackendError: If one is NaN or infinite.
    """
    is_finite = np.isfinite(logits)
    if not is_finite.all():
        raise BackendError(
            f"Logits of sample {sample} at step {step} have {np.isnan(logits).sum()} NaN and "
            f"{np.isinf(logits).sum()} infinite values among {logits.size}, expected finite "
            "ones. The model overflowed: use a bundle of another precision, float32 to be sure."
        )


def penalised(logits: np.ndarray, token_ids: np.ndarray, penalty: float) -> np.ndarray:
    """Return logits in which tokens that were there before are less likely.

    Args:
        logits: [vocab_size] float32.
        token_ids: [t] int64, of prompt and answer; placeholders (negative) do not count.
        penalty: What positive logits are divided by, and negative ones multiplied with.

    Source: CTRL (Keskar et al., 2019), section 4.1, as in transformers.
    """
    seen = np.unique(token_ids)
    seen = seen[seen >= 0]
    result = logits.copy()
    values = result[seen]
    result[seen] = np.where(values > 0, values / penalty, values * penalty)
    return result


def processed(
    logits: np.ndarray, token_ids: list[int], processors: Sequence[LogitsProcessor]
) -> np.ndarray:
    """Return logits after all processors, each on what the one before gave.

    Raises:
        InvalidInputError: If one gives something else than logits, or excludes every token.
    """
    logits = logits.copy()
    for processor in processors:
        given = processor(logits, list(token_ids))
        if given is None:
            given = logits
        changed = as_array(given, "logits")
        # The shape is compared last: what follows needs numbers.
        is_right = changed.dtype.kind == "f" and changed.shape == logits.shape
        if not is_right or np.isnan(changed).any() or not np.isfinite(changed.max()):
            raise InvalidInputError(
                f"Logits processor {processor!r} gave {changed.dtype} of shape "
                f"{[*changed.shape]}{' with NaN, +inf or only -inf' if is_right else ''}; "
                f"expected floating-point values of shape {[*logits.shape]}, -inf for tokens "
                "to leave out but not for all. Return such logits, or None after writing into "
                "the given ones."
            )
        logits = changed.astype(np.float32)
    return logits


def token_logprob(logits: np.ndarray, token_id: int, num_top: int) -> TokenLogprob:
    """Return the natural logarithm of probabilities: the chosen token's and the largest.

    Args:
        logits: [vocab_size] float32, as the model gave them.
        token_id: The chosen one.
        num_top: How many of the likeliest to tell.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top = np.argsort(-values, kind="stable")[:num_top]
    return TokenLogprob(
        token_id, float(values[token_id]), {int(token): float(values[token]) for token in top}
    )
