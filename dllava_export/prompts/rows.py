"""Turn token ids and image features into the rows a decoder is fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dllava_export import names
from dllava_export.errors import InvalidInputError
from dllava_export.families.positions import PositionRule
from dllava_export.names import IMAGE_PLACEHOLDER_ID

__all__ = ["PromptRows", "assemble_prompt"]


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """A right-padded batch of prompts.

    Attributes:
        inputs_embeds: [batch, rows, hidden_size]; zeros where padded.
        token_kind: [batch, rows] int64, see `names`.
        position_ids: [batch, rows] int64.
        next_positions: [batch] int64, the position of the token that follows each prompt.
        lengths: [batch] int64, valid rows.
        num_image: [batch] int64, image rows.
        image_start: [batch] int64, first image row; 0 without an image.
    """

    inputs_embeds: np.ndarray
    token_kind: np.ndarray
    position_ids: np.ndarray
    next_positions: np.ndarray
    lengths: np.ndarray
    num_image: np.ndarray
    image_start: np.ndarray


def assemble_prompt(
    prompts: Sequence[np.ndarray],
    image_features: np.ndarray | None,
    lookup: Callable[[np.ndarray], np.ndarray],
    positions: PositionRule,
    *,
    outputs: np.ndarray | None = None,
) -> PromptRows:
    """Put image features in the place of placeholders.

    Args:
        prompts: One int64 array of ids per sample, at most one of them the placeholder.
        image_features: [num_images, num_image_tokens, hidden_size], one per placeholder, in
            order; None without any.
        lookup: Maps ids [n] to embeddings [n, hidden_size].
        positions: How the family numbers rows.
        outputs: [batch, num_generated] int64, generated so far (for recompute).

    Raises:
        InvalidInputError: If placeholders and images do not match in number.
    """
    features = iter(() if image_features is None else image_features)
    num_images = 0 if image_features is None else len(image_features)
    wanted = sum(int((ids == IMAGE_PLACEHOLDER_ID).any()) for ids in prompts)
    if wanted != num_images:
        raise InvalidInputError(
            f"{wanted} of {len(prompts)} prompts have an image placeholder, but {num_images} "
            "images were given. Give one image for each prompt with a placeholder, in order."
        )
    rows, kinds, starts = [], [], []
    for sample, ids in enumerate(prompts):
        places = np.flatnonzero(ids == IMAGE_PLACEHOLDER_ID)
        start = int(places[0]) if places.size else len(ids)
        pieces = [lookup(ids[:start])]
        kind = [np.full(start, names.PROMPT_TEXT)]
        if places.size:
            image = next(features)
            pieces += [image, lookup(ids[start + 1 :])]
            kind += [
                np.full(len(image), names.IMAGE),
                np.full(len(ids) - start - 1, names.PROMPT_TEXT),
            ]
        if outputs is not None:
            pieces.append(lookup(outputs[sample]))
            kind.append(np.full(outputs.shape[1], names.GENERATED_TEXT))
        dtype = pieces[0].dtype
        rows.append(np.concatenate([piece.astype(dtype, copy=False) for piece in pieces]))
        kinds.append(np.concatenate(kind))
        starts.append(start if places.size else 0)
    lengths = np.array([len(row) for row in rows], np.int64)
    shape = len(rows), int(lengths.max())
    inputs_embeds = np.zeros((*shape, rows[0].shape[1]), rows[0].dtype)
    token_kind = np.full(shape, names.PADDING, np.int64)
    for sample, (row, kind_row) in enumerate(zip(rows, kinds, strict=True)):
        inputs_embeds[sample, : len(row)] = row
        token_kind[sample, : len(row)] = kind_row
    position_ids, next_positions = positions.prompt(token_kind)
    return PromptRows(
        inputs_embeds,
        token_kind,
        position_ids,
        next_positions,
        lengths,
        (token_kind == names.IMAGE).sum(1),
        np.array(starts, np.int64),
    )
