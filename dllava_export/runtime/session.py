"""Answer prompts with a bundle: whole answers, streams, conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from dllava_export.errors import InvalidInputError
from dllava_export.runtime.chat import Chat
from dllava_export.runtime.decoding import DecodingSession
from dllava_export.runtime.generation import (
    GenerationLoop,
    GenerationSettings,
    PromptOptions,
    Stream,
    prompt_ids,
    start_run,
)
from dllava_export.settings import settings_from

if TYPE_CHECKING:
    from dllava_export.prompts.reader import Prompts
    from dllava_export.runtime.results import Generation, ImageInput, OnToken

__all__ = ["Session"]


class Session(DecodingSession):
    """A bundle that answers prompts. Made by `load`; a context manager that closes it.

    `generate` gives whole answers, `stream` one piece by piece, `chat` a conversation. What
    they are made of is public too, see `DecodingSession`.
    """

    @overload
    def generate(  # type: ignore[overload-overlap]  # one prompt is a sequence of strings too
        self,
        prompts: str,
        *,
        image: ImageInput | None = None,
        system: str | None = None,
        raw_prompt: bool = False,
        allow_special: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        mode: str = "cache",
        on_token: OnToken | None = None,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | None = None,
        images: Sequence[ImageInput | None] | None = None,
        *,
        input_ids: Prompts | None = None,
        system: str | None = None,
        raw_prompt: bool = False,
        allow_special: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        mode: str = "cache",
        on_token: OnToken | None = None,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        images: Sequence[ImageInput | None] | None = None,
        *,
        image: ImageInput | None = None,
        input_ids: Prompts | None = None,
        system: str | None = None,
        raw_prompt: bool = False,
        allow_special: bool = False,
        on_token: OnToken | None = None,
        **settings: Any,
    ) -> Generation | list[Generation]:
        """Answer a prompt, or a batch of prompts.

        `generate("What is this?", image="cat.png")` gives one answer,
        `generate(["What?", "Where?"], ["cat.png", "dog.png"])` a list of them.

        Args:
            prompts: The question, or several; the bundle's chat template is put around each.
            images: One per prompt of a list: what `ImageProcessor` takes (a path, a PIL image,
                an array, bytes, ...), or None without an image.
            image: The picture of a single prompt.
            input_ids: Token ids instead of `prompts`, as for prefill.
            system: What stands before the conversation instead of the template's own text.
            raw_prompt: A prompt is a whole conversation, with `<image>` in the image's place:
                no template is put around it.
            allow_special: Control tokens in a prompt, such as `</s>`, are control tokens; by
                default they are text like any other.
            max_new_tokens: Tokens generated at most, per sample; 128 by default.
            temperature: 0, the default, takes the likeliest token.
            top_p: Share of probability to sample from, in (0, 1].
            seed: For sampling; each sample of a batch has its own stream.
            mode: `cache`, or `recompute` for a pass without KV cache per token.
            on_token: Called with (sample, token id, text) as tokens come; text is empty
                while it is incomplete, or without a tokenizer.
            **settings: Those of the overloads: `max_new_tokens` to `mode`.

        Returns:
            One `Generation` per prompt, each equal to what the prompt gives alone.

        Raises:
            InvalidInputError: If prompts and images do not fit.
            CapacityError: If a prompt is too long.
            SettingError: If a setting is out of range.
        """
        chosen = settings_from(GenerationSettings, settings)
        options = PromptOptions(system, raw_prompt, allow_special)
        if isinstance(prompts, str):
            if images is not None or input_ids is not None:
                raise InvalidInputError(
                    "One prompt was given with a list; its picture is `image`. Pass lists of "
                    "prompts and images for several answers."
                )
            loop = self._loop([prompts], [image], None, chosen, options)
        elif image is not None:
            raise InvalidInputError(
                "`image` is the picture of a single prompt; with a list of prompts pass "
                "`images`, one or None for each."
            )
        else:
            loop = self._loop(prompts, images, input_ids, chosen, options)
        for piece in loop.pieces():
            if on_token is not None:
                on_token(piece.sample, piece.token_id, piece.text)
        return loop.results[0] if isinstance(prompts, str) else loop.results

    def stream(
        self,
        prompt: str | None = None,
        *,
        image: ImageInput | None = None,
        input_ids: Sequence[int] | np.ndarray | None = None,
        system: str | None = None,
        raw_prompt: bool = False,
        allow_special: bool = False,
        **settings: Any,
    ) -> Stream:
        """Answer a prompt piece by piece.

        `for piece in session.stream("What is this?", image="cat.png"): print(piece.text)`

        Args:
            prompt: The question.
            image: Its picture.
            input_ids: [t] token ids instead of `prompt`, -200 for the image.
            system: See `generate`.
            raw_prompt: See `generate`.
            allow_special: See `generate`.
            **settings: See `generate`.

        Returns:
            An iterator of `Piece`; its `result` is the answer, `close()` ends it early.

        Raises:
            InvalidInputError: If prompt and image do not fit.
            CapacityError: If the prompt is too long; when the iteration starts.
            SettingError: If a setting is out of range.
        """
        prompts = None if prompt is None else [prompt]
        ids = None if input_ids is None else [np.asarray(input_ids)]
        chosen = settings_from(GenerationSettings, settings)
        options = PromptOptions(system, raw_prompt, allow_special)
        return Stream(self._loop(prompts, [image], ids, chosen, options))

    def chat(
        self,
        *,
        system: str | None = None,
        raw_prompt: bool = False,
        allow_special: bool = False,
    ) -> Chat:
        """Return a conversation whose turns build on each other's caches; see `Chat`.

        Args:
            system: See `generate`.
            raw_prompt: Nothing is put around questions: see `generate`.
            allow_special: See `generate`.
        """
        return Chat(self, PromptOptions(system, raw_prompt, allow_special))

    def _loop(
        self,
        prompts: Sequence[str] | None,
        images: Sequence[ImageInput | None] | None,
        input_ids: Prompts | None,
        settings: GenerationSettings,
        options: PromptOptions,
    ) -> GenerationLoop:
        ids = prompt_ids(self, prompts, images, input_ids, options)
        return GenerationLoop(self, start_run(self, ids, images, settings), settings)
