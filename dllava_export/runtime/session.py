"""Answer prompts with a bundle: whole answers, streams, conversations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from dllava_export.errors import InvalidInputError
from dllava_export.runtime.chat import Chat
from dllava_export.runtime.decoding import DecodingSession
from dllava_export.runtime.generation import (
    GenerationLoop,
    GenerationSettings,
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
        image: ImageInput | None = None,
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
        on_token: OnToken | None = None,
        **settings: Any,
    ) -> Generation | list[Generation]:
        """Answer a prompt, or a batch of prompts.

        `generate("What is this?", image="cat.png")` gives one answer,
        `generate(["What?", "Where?"], ["cat.png", "dog.png"])` a list of them.

        Args:
            prompts: The question, or several; the bundle's chat template is put around each.
            images: One per prompt of a list: a path, a PIL image, an array, or None without an
                image.
            image: The picture of a single prompt.
            input_ids: Token ids instead of `prompts`, as for prefill.
            max_new_tokens: Tokens generated at most, per sample; 128 by default.
            temperature: 0, the default, takes the likeliest token.
            top_p: Share of probability to sample from, in (0, 1].
            seed: For sampling; each sample of a batch has its own stream.
            mode: `cache`, or `recompute` for a pass without KV cache per token.
            on_token: Called with (sample, token id, text) as tokens come; text is empty
                while it is incomplete, or without a tokenizer. It must not use the session.
            **settings: Those of the overloads: `max_new_tokens` to `mode`.

        Returns:
            One `Generation` per prompt, each equal to what the prompt gives alone.

        Raises:
            InvalidInputError: If prompts and images do not fit, the thread is in the middle
                of another answer, or the session is closed.
            CapacityError: If a prompt is too long.
            SettingError: If a setting is out of range.
        """
        chosen = settings_from(GenerationSettings, settings)
        if isinstance(prompts, str):
            if images is not None or input_ids is not None:
                raise InvalidInputError(
                    "One prompt was given with a list; its picture is `image`. Pass lists of "
                    "prompts and images for several answers."
                )
            loop = self._loop([prompts], [image], None, chosen)
        elif image is not None:
            raise InvalidInputError(
                "`image` is the picture of a single prompt; with a list of prompts pass "
                "`images`, one or None for each."
            )
        else:
            loop = self._loop(prompts, images, input_ids, chosen)
        # An error of on_token's must not leave the session to a generation that is over.
        with contextlib.closing(loop.pieces()) as pieces:
            for piece in pieces:
                if on_token is not None:
                    on_token(piece.sample, piece.token_id, piece.text)
        return loop.results[0] if isinstance(prompts, str) else loop.results

    def stream(
        self,
        prompt: str | None = None,
        *,
        image: ImageInput | None = None,
        input_ids: Sequence[int] | np.ndarray | None = None,
        **settings: Any,
    ) -> Stream:
        """Answer a prompt piece by piece.

        `for piece in session.stream("What is this?", image="cat.png"): print(piece.text)`

        Args:
            prompt: The question.
            image: Its picture.
            input_ids: [t] token ids instead of `prompt`, -200 for the image.
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
        return Stream(
            self._loop(prompts, [image], ids, settings_from(GenerationSettings, settings))
        )

    def chat(self) -> Chat:
        """Return a conversation whose turns build on each other's caches; see `Chat`."""
        return Chat(self)

    def _loop(
        self,
        prompts: Sequence[str] | None,
        images: Sequence[ImageInput | None] | None,
        input_ids: Prompts | None,
        settings: GenerationSettings,
    ) -> GenerationLoop:
        ids = prompt_ids(self, prompts, images, input_ids)
        return GenerationLoop(self, start_run(self, ids, images, settings), settings)
