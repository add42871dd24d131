"""Image placeholders in token ids: one spelling, checked against the images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dllava_export.errors import InvalidInputError
from dllava_export.names import IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER_ID
from dllava_export.short_text import shortened

__all__ = ["check_image_list", "check_prompt", "normalise_placeholders"]


def normalise_placeholders(
    input_ids: Iterable[int], image_token_id: int, num_image_tokens: int
) -> np.ndarray:
    """Write every image placeholder of one sample as a single -200.

    Both -200 and `image_token_id` are understood. A run of exactly `num_image_tokens` of them
    is one image whose token was already repeated for each row (llava-hf's processor does so);
    any other run is left at its length, for `check_prompt` to refuse.

    Args:
        input_ids: [seq_len], integers. Token ids of one sample.
        image_token_id: The image token's id in the checkpoint; may be -200 itself.
        num_image_tokens: Rows that one image puts into the sequence.

    Returns:
        [new_seq_len], int64.
    """
    ids = np.array(list(input_ids), np.int64)
    is_image = (ids == IMAGE_PLACEHOLDER_ID) | (ids == image_token_id)
    ids[is_image] = IMAGE_PLACEHOLDER_ID
    edges = np.flatnonzero(np.diff(is_image, prepend=False, append=False))
    keep = np.ones(len(ids), bool)
    for start, end in edges.reshape(-1, 2):
        if end - start == num_image_tokens:
            keep[start + 1 : end] = False
    return ids[keep]


def check_image_list(images: object) -> None:
    """Refuse one picture where a list of them is expected.

    Raises:
        InvalidInputError: If `images` is neither a list, nor an array of pictures, nor None.
    """
    is_batch = isinstance(images, np.ndarray) and images.ndim == 4
    is_list = isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray)
    if images is not None and not is_list and not is_batch:
        raise InvalidInputError(
            f"images is one {type(images).__name__} ({shortened(repr(images))}), expected a "
            "list with a picture, or None, for each prompt. Pass images=[picture], or "
            "image=picture with a single prompt."
        )


def check_prompt(
    input_ids: Sequence[np.ndarray],
    *,
    has_image: bool | Sequence[bool],
    vocab_size: int,
) -> None:
    """Refuse prompts that do not fit their images or the vocabulary.

    Args:
        input_ids: For each sample [seq_len], int64, from `normalise_placeholders`; lengths may
            differ.
        has_image: Whether each sample comes with an image; one bool stands for all.
        vocab_size: Rows of the token embedding.

    Raises:
        InvalidInputError: If a sample is empty, has a placeholder without an image, an image
            without a placeholder, several placeholders, or an id outside the vocabulary.
    """
    flags = [has_image] * len(input_ids) if isinstance(has_image, bool) else list(has_image)
    if len(flags) != len(input_ids):
        raise InvalidInputError(
            f"{len(input_ids)} prompts come with {len(flags)} image entries; expected one for "
            "each. Pass None for a prompt without an image."
        )
    for sample, (ids, image) in enumerate(zip(input_ids, flags, strict=True)):
        _check_sample(sample, np.asarray(ids), image, vocab_size)


def _check_sample(sample: int, ids: np.ndarray, has_image: bool, vocab_size: int) -> None:
    if ids.ndim != 1 or ids.size == 0:
        raise InvalidInputError(
            f"Sample {sample}: the prompt has shape {list(ids.shape)}, expected at least one "
            "token id in one dimension. Pass the ids of one prompt per sample."
        )
    is_image = ids == IMAGE_PLACEHOLDER_ID
    found = int(is_image.sum())
    if found == 0 and has_image:
        raise InvalidInputError(
            f"Sample {sample}: there is an image, but no placeholder for it in the prompt; "
            f"expected one {IMAGE_PLACEHOLDER_ID}. Put {IMAGE_PLACEHOLDER!r} where the image "
            "belongs, or pass no image."
        )
    if found and not has_image:
        raise InvalidInputError(
            f"Sample {sample}: the prompt has {found} image placeholder(s), but there is no "
            "image; expected none. Pass the image, or remove the placeholder."
        )
    if found > 1:
        raise InvalidInputError(
            f"Sample {sample}: the prompt has {found} image placeholders, at "
            f"{shortened(np.flatnonzero(is_image).tolist())}; expected 1, since one image "
            "per prompt is supported. Remove the others."
        )
    outside = np.flatnonzero(~is_image & ((ids < 0) | (ids >= vocab_size)))
    if outside.size:
        raise InvalidInputError(
            f"Sample {sample}: token id {ids[outside[0]]} at position {outside[0]} is not in "
            f"the vocabulary; expected 0 to {vocab_size - 1}, or {IMAGE_PLACEHOLDER_ID} for "
            "the image. Use this bundle's tokenizer."
        )
