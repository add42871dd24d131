"""Answer prompts with a bundle: whole answers, streams, conversations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from dllava_export.boundary import expected_errors_only, raises_expected_errors_only
from dllava_export.errors import InvalidInputError
from dllava_export.prompts.token_ids import checked_ids, is_one_row
from dllava_export.runtime.chat import Chat
from dllava_export.runtime.decoding import DecodingSession
from dllava_export.runtime.generation import (
    GenerationLoop,
    GenerationSettings,
    Stream,
)
from dllava_export.runtime.prompting import PromptOptions, prompt_ids
from dllava_export.runtime.results import NOT_GIVEN, NotGiven
from dllava_export.runtime.runs import start_run
from dllava_export.settings import settings_from

if TYPE_CHECKING:
    from dllava_export.prompts.reader import AttentionMask, Prompts
    from dllava_export.runtime.logits import LogitsProcessor
    from dllava_export.runtime.results import Generation, ImageInput, OnToken

__all__ = ["Session"]


class Session(DecodingSession):
    """A bundle that answers prompts. Made by `load`; a context manager that closes it.

    `generate` gives whole answers, `stream` one piece by piece, `chat` a conversation. What
    they are made of is public too, see `DecodingSession`.

    One caller uses a session at a time. A second thread's `generate`, `stream` or `Chat.ask`
    waits until the whole answer before is there; asked from `on_token`, or by the thread that
    is taking the pieces of a stream, it is refused with `InvalidInputError`, since it would
    wait for itself.
    """

    @overload
    def generate(  # type: ignore[overload-overlap]  # one prompt is a sequence of strings too
        self,
        prompts: str,
        *,
        image: ImageInput | NotGiven | None = NOT_GIVEN,
        system: str | None = None,
        raw_prompt: bool = False,
        allow_special: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        mode: str = "cache",
        top_k: int | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        logits_processors: Sequence[LogitsProcessor] = (),
        top_logprobs: int | None = None,
        on_token: OnToken | None = None,
    ) -> Generation: ...

    @overload
    def generate(  # type: ignore[overload-overlap]  # a batch is a sequence too
        self,
        *,
        image: ImageInput | NotGiven | None = NOT_GIVEN,
        input_ids: Sequence[int],
        attention_mask: AttentionMask | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        mode: str = "cache",
        top_k: int | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        logits_processors: Sequence[LogitsProcessor] = (),
        top_logprobs: int | None = None,
        on_token: OnToken | None = None,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | None = None,
        images: Sequence[ImageInput | None] | None = None,
        *,
        input_ids: Prompts | None = None,
        attention_mask: AttentionMask | None = None,
        system: str | None = None,
        raw_prompt: bool = False,
        allow_special: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        mode: str = "cache",
        top_k: int | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        logits_processors: Sequence[LogitsProcessor] = (),
        top_logprobs: int | None = None,
        on_token: OnToken | None = None,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        images: Sequence[ImageInput | None] | None = None,
        *,
        image: ImageInput | NotGiven | None = NOT_GIVEN,
        input_ids: Prompts | None = None,
        attention_mask: AttentionMask | None = None,
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
                an array, bytes, ...), or None for a text-only prompt. A bundle that takes
                pictures needs to be told.
            image: The picture of a single prompt; likewise.
            input_ids: Token ids instead of `prompts`, as for prefill; those of a single prompt
                in one dimension give one answer.
            attention_mask: As for prefill; with `input_ids`.
            system: What stands before the conversation instead of the template's own text.
            raw_prompt: A prompt is a whole conversation, with `<image>` in the image's place:
                no template is put around it.
            allow_special: Control tokens in a prompt, such as `</s>`, are control tokens; by
                default they are text like any other.
            max_new_tokens: Tokens generated at most, per sample; 128 by default. It also sizes
                the sparse caches: where they run full (`Generation.num_forced_drops`), another
                number may give another answer.
            temperature: 0, the default, takes the likeliest token.
            top_p: Share of probability to sample from, in (0, 1].
            seed: For sampling; each sample of a batch has its own stream.
            mode: `cache`, or `recompute` for a pass without KV cache per token.
            top_k: Number of likeliest tokens to sample from.
            min_p: Leaves out tokens below this share of the likeliest one's probability.
            repetition_penalty: Above 1, makes tokens that were there before less likely.
            stop: One text, or several, that end the answer.
            logits_processors: Callables that change logits, see `LogitsProcessor`.
            top_logprobs: How many of the likeliest tokens to tell beside the chosen one.
            on_token: Called with (sample, token id, text) as tokens come; text is empty
                while it is incomplete, or without a tokenizer. It must not use the session.
            **settings: Those of `GenerationSettings`: `max_new_tokens` to `top_logprobs`.

        Returns:
            One `Generation` per prompt, each equal to what the prompt gives alone.

        Raises:
            InvalidInputError: If prompts and images do not fit, the thread is in the middle
                of another answer, or the session is closed.
            CapacityError: If a prompt is too long.
            SettingError: If a setting is out of range.
        """
        chosen = settings_from(GenerationSettings, settings)
        options = PromptOptions(system, raw_prompt, allow_special)
        ids_of_one = prompts is None and input_ids is not None and is_one_row(input_ids)
        is_single = isinstance(prompts, str) or ids_of_one
        if is_single:
            if images is not None or (prompts is not None and input_ids is not None):
                raise InvalidInputError(
                    "One prompt was given with a list; its picture is `image`. Pass lists of "
                    "prompts and images for several answers."
                )
            images = None if isinstance(image, NotGiven) else [image]
            if isinstance(prompts, str):
                prompts = [prompts]
        elif not isinstance(image, NotGiven):
            raise InvalidInputError(
                "`image` is the picture of a single prompt; with a list of prompts pass "
                "`images`, one or None for each."
            )
        loop = self._loop(prompts, images, input_ids, attention_mask, chosen, options)
        # An error of on_token's must not leave the session to a generation that is over.
        with contextlib.closing(loop.pieces()) as pieces:
            for piece in pieces:
                if on_token is not None:
                    on_token(piece.sample, piece.token_id, piece.text)
        return loop.results[0] if is_single else loop.results

    @raises_expected_errors_only
    def stream(
        self,
        prompt: str | None = None,
        *,
        image: ImageInput | NotGiven | None = NOT_GIVEN,
        input_ids: Sequence[int] | np.ndarray | None = None,
        attention_mask: Sequence[int] | np.ndarray | None = None,
        system: str | None = None,
        raw_prompt: bool = False,
        allow_special: bool = False,
        **settings: Any,
    ) -> Stream:
        """Answer a prompt piece by piece.

        `for piece in session.stream("What is this?", image="cat.png"): print(piece.text)`

        Args:
            prompt: The question.
            image: Its picture; None for a text-only prompt. A bundle that takes pictures
                needs to be told.
            input_ids: [t] token ids instead of `prompt`, -200 for the image.
            attention_mask: [t] of 0 and 1, as for prefill; with `input_ids`.
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
        ids = None if input_ids is None else [checked_ids(input_ids, "input_ids", num_dims=1)]
        mask = None if attention_mask is None else [np.asarray(attention_mask)]
        images = None if isinstance(image, NotGiven) else [image]
        chosen = settings_from(GenerationSettings, settings)
        options = PromptOptions(system, raw_prompt, allow_special)
        return Stream(self._loop(prompts, images, ids, mask, chosen, options))

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
        attention_mask: AttentionMask | None,
        settings: GenerationSettings,
        options: PromptOptions,
    ) -> GenerationLoop:
        with expected_errors_only("generate"):  # a caller's on_token may raise what it likes
            ids = prompt_ids(
                self,
                prompts,
                images,
                options=options,
                input_ids=input_ids,
                attention_mask=attention_mask,
            )
            if prompts and images is None and self.manifest.has_visual:
                raise InvalidInputError(
                    "The bundle takes an image with its prompt, and none was given. Pass "
                    "image=..., or images=[...] for several prompts; None in its place makes a "
                    "prompt text-only."
                )
            run = start_run(self, ids, images, settings.max_new_tokens, settings.mode)
            return GenerationLoop(self, run, settings)
