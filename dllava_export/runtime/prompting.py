"""From what a caller asks with, text or token ids, to the token ids of each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dllava_export.errors import InvalidInputError
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.placeholders import check_image_list
from dllava_export.prompts.prompt_text import checked_text
from dllava_export.prompts.token_ids import CheckedPrompts

if TYPE_CHECKING:
    from dllava_export.prompts.reader import AttentionMask, Prompts
    from dllava_export.runtime.decoding import DecodingSession

__all__ = ["PromptOptions", "prompt_ids"]


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """How text becomes a prompt; see `Session.generate`."""

    system: str | None = None
    raw_prompt: bool = False
    allow_special: bool = False


def prompt_ids(
    session: DecodingSession,
    prompts: Sequence[str] | None,
    images: Sequence[Any] | None,
    *,
    options: PromptOptions,
    input_ids: Prompts | None = None,
    attention_mask: AttentionMask | None = None,
) -> CheckedPrompts:
    """Return the token ids of each prompt, [t] int64, image placeholders among them.

    Raises:
        InvalidInputError: If prompts and images do not fit each other.
    """
    check_image_list(images)
    if prompts is not None and input_ids is None:
        if attention_mask is not None:
            raise InvalidInputError(
                "attention_mask goes with input_ids; prompts have no padding."
            )
        return _ids_of_texts(session, prompts, images, options)
    if input_ids is None or prompts is not None:
        raise InvalidInputError("Give either prompts or input_ids, one of the two.")
    if options != PromptOptions():
        raise InvalidInputError(
            "system, raw_prompt and allow_special say how text becomes token ids, and token ids "
            "were given. Leave them out."
        )
    ids = session.normalised_prompts(input_ids, attention_mask)
    for sample, (row, with_image) in enumerate(
        zip(ids, _has_image(images, len(ids)), strict=True)
    ):
        if bool((row == IMAGE_PLACEHOLDER_ID).any()) != with_image:
            found, wanted = ("no", "an") if with_image else ("an", "no")
            raise InvalidInputError(
                f"Prompt {sample} has {found} image placeholder ({IMAGE_PLACEHOLDER_ID}), but "
                f"{wanted} image was given with it. Give both or neither."
            )
    return ids


def _ids_of_texts(
    session: DecodingSession,
    prompts: Sequence[str],
    images: Sequence[Any] | None,
    options: PromptOptions,
) -> CheckedPrompts:
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise InvalidInputError(
            f"prompts is {type(prompts).__name__}, expected a text, or a list of texts. "
            "Pass generate(prompts, images)."
        )
    has_image = _has_image(images, len(prompts))
    texts = [checked_text(text, f"Prompt {i}") for i, text in enumerate(prompts)]
    tokenizer = session.tokenizer
    return CheckedPrompts(
        tokenizer.encode(
            tokenizer.render(
                text,
                with_image=with_image,
                system=options.system,
                raw=options.raw_prompt,
                allow_special=options.allow_special,
            )
        )
        for text, with_image in zip(texts, has_image, strict=True)
    )


def _has_image(images: Sequence[Any] | None, count: int) -> list[bool]:
    if images is None:
        return [False] * count
    if len(images) != count:
        raise InvalidInputError(
            f"{len(images)} images were given for {count} prompts; expected one image, or None, "
            "for each prompt."
        )
    return [image is not None for image in images]
