"""Token ids as callers give them: checked once, and then int64."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from dllava_export.errors import InvalidInputError

__all__ = [
    "CheckedPrompts",
    "as_array",
    "checked_ids",
    "checked_mask",
    "checked_prompts",
    "is_one_row",
    "without_padding",
]


class CheckedPrompts(list[np.ndarray]):
    """One int64 array per sample, [t]: nothing in them is padding, -200 stands for an image."""


def checked_ids(values: Any, what: str, *, num_dims: int | None = None) -> np.ndarray:
    """Return integers as int64, in the shape they have.

    Args:
        values: An array, a tensor or nested lists.
        what: Their name, for messages.
        num_dims: Dimensions that they must have; any number where None.

    Raises:
        InvalidInputError: If they are anything but integers that int64 holds: fractions, text
            and booleans are no token ids.
    """
    array = values if isinstance(values, np.ndarray) else as_array(values, what)
    is_integer = array.dtype.kind in "iu" and not _has_bool(values)
    if not (is_integer or not array.size) or num_dims not in (None, array.ndim):
        found = "booleans" if _has_bool(values) else array.dtype
        wanted = {None: "", 1: " in one dimension", 2: " in two dimensions"}[num_dims]
        raise InvalidInputError(
            f"{what} is {found} of shape {[*array.shape]}, expected integers{wanted}. Pass "
            "token ids as the tokenizer gives them."
        )
    if array.dtype == np.int64:
        return array
    if array.size and array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidInputError(
            f"{what} has {array.max()}, expected integers that fit int64. Pass token ids as the "
            "tokenizer gives them."
        )
    return array.astype(np.int64)


def checked_mask(values: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return zeros and ones as bool.

    Args:
        values: An array, a tensor or nested lists of booleans, or of 0 and 1.
        what: Their name, for messages.
        shape: What they must have.

    Raises:
        InvalidInputError: If they are something else.
    """
    if isinstance(values, np.ndarray) and values.dtype == bool and values.shape == shape:
        return values
    array = as_array(values, what)
    is_mask = array.dtype.kind == "b" or (
        array.dtype.kind in "iu" and bool(np.isin(array, (0, 1)).all())
    )
    if array.size and not is_mask:
        raise InvalidInputError(
            f"{what} is {array.dtype} with values other than 0 and 1, expected one or the "
            "other for each entry."
        )
    if array.shape != shape:
        raise InvalidInputError(f"{what} has shape {array.shape}, expected {shape}.")
    return array.astype(bool)


def checked_prompts(input_ids: Any) -> list[np.ndarray]:
    """Return one int64 array per sample; a single row of ids is one sample.

    Args:
        input_ids: [batch, t] or [t] ids: an array, a tensor or lists; or one row per sample.

    Raises:
        InvalidInputError: If a sample is not a row of integers.
    """
    return [
        checked_ids(row, f"Sample {sample} of input_ids", num_dims=1)
        for sample, row in enumerate(_rows(input_ids, "input_ids"))
    ]


def is_one_row(values: Any) -> bool:
    """Whether ids, or a mask, are those of one prompt, [t], and not of a batch."""
    if hasattr(values, "ndim"):
        return bool(values.ndim == 1)
    is_sequence = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    return (
        is_sequence
        and len(values) > 0
        and not any(isinstance(v, Sequence) or getattr(v, "ndim", 0) for v in values)
    )


def _rows(values: Any, what: str) -> list[Any]:
    """Return what there is for each sample."""
    if is_one_row(values):
        return [values]
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise InvalidInputError(
            f"{what} is {type(values).__name__}, expected [batch, t] numbers, or a list with "
            "one array per sample."
        )
    if getattr(values, "ndim", 2) == 0:
        raise InvalidInputError(f"{what} is a single number, expected [batch, t] or [t].")
    return list(values)


def without_padding(
    prompts: Sequence[np.ndarray], attention_mask: Any, pad_ids: Collection[int], shared: bool
) -> list[np.ndarray]:
    """Return prompts without their padding.

    Args:
        prompts: For each sample [t] int64.
        attention_mask: For each sample [t], 1 where a token is, 0 where padding is, at the
            ends only; None where nothing is padded.
        pad_ids: Ids that may be padding.
        shared: Whether a pad id is a token of its own right too, for example the end of
            sequence; one at an end is then taken for that.

    Raises:
        InvalidInputError: If the mask does not fit, or there is none and a prompt begins or
            ends with pad ids.
    """
    if attention_mask is None:
        for sample, ids in enumerate(prompts):
            _refuse_padding(sample, ids, pad_ids, 2 if shared else 1)
        return list(prompts)
    masks = _rows(attention_mask, "attention_mask")
    if len(masks) != len(prompts):
        raise InvalidInputError(
            f"attention_mask is for {len(masks)} samples, input_ids for {len(prompts)}; "
            "expected one row for each."
        )
    return [
        _unpadded(sample, ids, mask)
        for sample, (ids, mask) in enumerate(zip(prompts, masks, strict=True))
    ]


def _unpadded(sample: int, ids: np.ndarray, mask: Any) -> np.ndarray:
    is_token = checked_mask(mask, f"Sample {sample} of attention_mask", ids.shape)
    places = np.flatnonzero(is_token)
    if not places.size:
        raise InvalidInputError(
            f"Sample {sample} of attention_mask has no 1, expected one for each token. Leave "
            "empty prompts out."
        )
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 != places.size:
        hole = first + int(np.argmin(is_token[first:]))
        raise InvalidInputError(
            f"Sample {sample} of attention_mask has a 0 at {hole}, between ones; expected "
            "padding at the ends only. Take out of input_ids what is no token."
        )
    return ids[first : last + 1]


def _refuse_padding(
    sample: int, ids: np.ndarray, pad_ids: Collection[int], at_least: int
) -> None:
    is_pad = np.isin(ids, list(pad_ids))
    for where, row in (("begins", is_pad), ("ends", is_pad[::-1])):
        count = int(np.argmin(row)) if not row.all() else len(row)
        if count >= at_least:
            pad = ids[0] if where == "begins" else ids[-1]
            raise InvalidInputError(
                f"Sample {sample} of input_ids {where} with {count} times {pad}, the id that "
                "stands for padding; expected tokens only. Pass attention_mask (all ones where "
                "it is meant as a token), or one array per sample without padding."
            )


def as_array(values: Any, what: str) -> np.ndarray:
    """Return what a caller gave as an array, of whatever type it is.

    Raises:
        InvalidInputError: If that cannot be.
    """
    try:
        return np.asarray(values)
    # A ragged list, a tensor that is elsewhere or needs a gradient.
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InvalidInputError(
            f"{what} cannot be read as an array: {error}. Pass an array, a tensor in memory of "
            "the CPU, or a list of numbers."
        ) from error


def _has_bool(values: Any) -> bool:
    """Whether a boolean is among numbers: NumPy would count it as 0 or 1."""
    if isinstance(values, bool | np.bool_):
        return True
    return isinstance(values, list | tuple) and any(map(_has_bool, values))
