"""Prompts to token ids and back: chat templates, image placeholder, streamed text."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dllava_export.errors import BundleError, InvalidInputError, SettingError
from dllava_export.families.config_file import read_json
from dllava_export.families.config_kinds import GENERATION_KINDS, TOKENIZER_KINDS
from dllava_export.names import IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.placeholders import _shortened

__all__ = ["ChatTokenizer", "StreamDecoder"]


# Source: LLaVA, llava/conversation.py, `conv_vicuna_v1`.
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VICUNA_END_OF_ANSWER = "</s>"
_TEMPLATES = ("vicuna_v1", "checkpoint")
# Stands for an answer, to find where a template goes on after one. A private-use character
# is in no template and no chat.
_ANSWER_MARK = "\ue000"
_INCOMPLETE = "\ufffd"

Turns = Sequence[tuple[str, str]]


class ChatTokenizer:
    """A tokenizer together with the chat template its model was trained on.

    Make one with `from_folder`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str,
        image_token_id: int,
        adds_bos: bool,
        eos_token_ids: tuple[int, ...],
        folder: pathlib.Path,
    ) -> None:
        if template not in _TEMPLATES:
            raise SettingError(
                f"template must be one of {', '.join(_TEMPLATES)}, got {template!r}."
            )
        self._tokenizer = tokenizer
        self._template = template
        self._image_token_id = image_token_id
        self._bos_id = tokenizer.bos_token_id if adds_bos else None
        self._eos_token_ids = eos_token_ids
        self._folder = folder

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        template: str,
        image_token_id: int,
    ) -> ChatTokenizer:
        """Load the tokenizer of a checkpoint or bundle folder. Nothing is downloaded.

        `tokenizer.json` is taken as it stands; a folder with `tokenizer.model` only (the
        original LLaVA) is read as LLaMA's SentencePiece model. Special tokens, the chat
        template and the end-of-text ids come from the files beside it.

        Args:
            folder: Holds `tokenizer.json` or `tokenizer.model`.
            template: `vicuna_v1` (original LLaVA and Dynamic-LLaVA) or `checkpoint`, the chat
                template in the folder (llava-hf).
            image_token_id: The id the checkpoint's config gives the image token: -200, or one
                of the vocabulary.

        Raises:
            BundleError: If no tokenizer can be read, or `checkpoint` is asked for and the
                folder has no chat template.
        """
        folder = pathlib.Path(folder)
        config = _settings(folder / "tokenizer_config.json")
        tokenizer, adds_bos = _load_tokenizer(folder, config)
        if template == "checkpoint" and tokenizer.chat_template is None:
            tokenizer.chat_template = _settings(folder / "chat_template.json").get(
                "chat_template"
            )
            if tokenizer.chat_template is None:
                raise BundleError(
                    f"Folder {folder} has no chat template: expected chat_template.jinja, "
                    "chat_template.json, or 'chat_template' in tokenizer_config.json. "
                    "Copy it from the checkpoint, or use the template vicuna_v1."
                )
        return cls(
            tokenizer,
            template=template,
            image_token_id=image_token_id,
            adds_bos=adds_bos,
            eos_token_ids=_eos_token_ids(folder, tokenizer),
            folder=folder,
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, ascending; empty where the folder names none."""
        return self._eos_token_ids

    def render(self, prompt: str, *, with_image: bool, history: Turns = ()) -> str:
        """Return the whole conversation as the model was trained to read it.

        Args:
            prompt: The user's question, without an image placeholder.
            with_image: Whether the conversation is about an image. Its placeholder stands
                before the first question.
            history: Earlier (question, answer) pairs, oldest first.

        Raises:
            InvalidInputError: If a question or answer holds the image placeholder.
            BundleError: If the checkpoint's chat template fails, or leaves the image out.
        """
        for text in (prompt, *(text for turn in history for text in turn)):
            if IMAGE_PLACEHOLDER in text:
                raise InvalidInputError(
                    f"Prompt {_shortened(text)!r} contains {IMAGE_PLACEHOLDER!r}; expected "
                    "plain text, since the placeholder is added for the image. Remove it."
                )
        if self._template == "vicuna_v1":
            return _render_vicuna(prompt, history, 0 if with_image else None)
        return self._render_checkpoint(prompt, with_image, history)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a rendered conversation.

        With `vicuna_v1` the pieces around `<image>` are tokenised one by one and joined with
        -200, so that each piece starts as a text of its own (LLaVA's `tokenizer_image_token`).
        With `checkpoint` the text is tokenised as a whole, where the tokenizer has an image
        token, and that token's id becomes -200: what the checkpoint's own processor does.
        One BOS stands at the start, if the tokenizer adds one at all.

        Args:
            text: What `render` returns.

        Returns:
            [seq_len], int64. Token ids, and -200 for each `<image>`.
        """
        ids = self._ids(text)
        if self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return np.array(ids, np.int64)

    def encode_answered(
        self, turns: Turns, *, image_turn: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of an answered conversation; for training, in `vicuna_v1`.

        Args:
            turns: (question, answer) pairs without image placeholders, oldest first.
            image_turn: The question, 0-based, before which the image placeholder stands; None
                without an image.

        Returns:
            [seq_len], int64: token ids as `encode` returns them.
            [seq_len], bool: true where an answer or the `</s>` after it stands.
        """
        text = ""
        spans = []
        for number, (question, answer) in enumerate(turns):
            asked = _render_vicuna(question, turns[:number], image_turn)
            text = f"{asked} {answer}{_VICUNA_END_OF_ANSWER}"
            spans.append((asked, text))
        ids = self.encode(text)
        is_answer = np.zeros(len(ids), bool)
        for asked, answered in spans:
            # Tokens up to the first that the text behind it changes: those the model is fed.
            start, end = (
                _num_shared(self.encode(part) if part != text else ids, ids)
                for part in (asked, answered)
            )
            is_answer[start:end] = True
        return ids, is_answer

    def encode_follow_up(self, prompt: str) -> np.ndarray:
        """Return the ids to feed on top of a KV cache for a further question.

        They stand for everything the template puts after an answer: with `vicuna_v1` the
        `</s>` that closes it, `USER: {prompt} ASSISTANT:`; no BOS and no image. The `</s>` is
        among them because generation that stops on it has not fed it. Tokens of the answer
        that were sampled but not fed (the last one, where generation stopped by length) are
        the caller's to put in front.

        Args:
            prompt: The user's question, without an image placeholder.

        Returns:
            [seq_len], int64. Token ids.

        Raises:
            InvalidInputError: If the question holds the image placeholder.
            BundleError: If the checkpoint's chat template fails, or leaves the answer out.
        """
        # The first round is about an image: a template may refuse a conversation without one.
        text = self.render(prompt, with_image=True, history=[("?", _ANSWER_MARK)])
        _, mark, follow_up = text.rpartition(_ANSWER_MARK)
        if not mark:
            raise BundleError(
                f"The chat template in {self._folder} leaves out earlier answers; expected "
                "them in the text. Start a new conversation for each question."
            )
        return np.array(self._ids(follow_up), np.int64)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of token ids, without special tokens and placeholders."""
        return self._text([token for token in map(int, token_ids) if token >= 0])

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder for text that is being generated; one for each sample."""
        return StreamDecoder(self)

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _ids(self, text: str) -> list[int]:
        if self._template == "checkpoint" and self._has_image_token:
            image_id = self._image_token_id
            return [
                IMAGE_PLACEHOLDER_ID if token == image_id else token
                for token in self._text_ids(text)
            ]
        first, *others = text.split(IMAGE_PLACEHOLDER)
        ids = self._text_ids(first)
        for piece in others:
            ids += [IMAGE_PLACEHOLDER_ID, *self._text_ids(piece)]
        return ids

    def _text_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _has_image_token(self) -> bool:
        return self._tokenizer.get_vocab().get(IMAGE_PLACEHOLDER) == self._image_token_id

    def _render_checkpoint(self, prompt: str, with_image: bool, history: Turns) -> str:
        import jinja2

        messages: list[dict[str, Any]] = []
        for question, answer in history:
            messages += [_message("user", question), _message("assistant", answer)]
        messages.append(_message("user", prompt))
        if with_image:
            messages[0]["content"].insert(0, {"type": "image"})
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise BundleError(
                f"The chat template in {self._folder} cannot be applied: {error}. Expected "
                "one for messages with lists of text and images. Use the template vicuna_v1, "
                "or copy the template from the checkpoint again."
            ) from error
        if text.count(IMAGE_PLACEHOLDER) != int(with_image):
            raise BundleError(
                f"The chat template in {self._folder} writes {text.count(IMAGE_PLACEHOLDER)} "
                f"times {IMAGE_PLACEHOLDER!r}, expected {int(with_image)}. Use the template "
                "vicuna_v1, or copy the template from the checkpoint again."
            )
        return text


class StreamDecoder:
    """Turns token ids, as they come, into text that is final.

    A character whose bytes are spread over several tokens is held back until it is complete.
    The pieces joined are what `ChatTokenizer.decode` makes of all ids at once, where those are
    valid UTF-8.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._chat = tokenizer
        self._special = frozenset(tokenizer._tokenizer.all_special_ids)
        self._window: list[int] = []
        self._num_given = 0

    def push(self, token_ids: int | Iterable[int]) -> str:
        """Return the text that `token_ids` complete; empty while a character is incomplete."""
        ids = [token_ids] if isinstance(token_ids, int | np.integer) else token_ids
        # A special token is not shown, but at the front of a window it would change the next.
        self._window += [i for i in map(int, ids) if i >= 0 and i not in self._special]
        text = self._pending()
        if text.endswith(_INCOMPLETE):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """Return what was held back, as it stands, and start a new text."""
        text = self._pending()
        self._window, self._num_given = [], 0
        return text

    def _pending(self) -> str:
        # Decoded with the tokens before them: a token's leading space depends on those.
        given = self._chat._text(self._window[: self._num_given])
        return self._chat._text(self._window)[len(given) :]

    def _advance(self) -> None:
        if self._num_given < len(self._window):
            self._window = self._window[self._num_given :]
            self._num_given = len(self._window)


def _render_vicuna(prompt: str, history: Turns, image_turn: int | None) -> str:
    questions = [*(question for question, _ in history), prompt]
    if image_turn is not None and image_turn < len(questions):
        questions[image_turn] = f"{IMAGE_PLACEHOLDER}\n{questions[image_turn]}"
    text = f"{_VICUNA_SYSTEM} "
    for question, (_, answer) in zip(questions, history, strict=False):
        text += f"USER: {question} ASSISTANT: {answer}{_VICUNA_END_OF_ANSWER}"
    return f"{text}USER: {questions[-1]} ASSISTANT:"


def _num_shared(start: np.ndarray, ids: np.ndarray) -> int:
    """Return how many ids are the same from the start on."""
    num = min(len(start), len(ids))
    differs = np.flatnonzero(start[:num] != ids[:num])
    return int(differs[0]) if differs.size else num


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _settings(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    kinds = {**TOKENIZER_KINDS, **GENERATION_KINDS}
    return read_json(path, "a folder with a tokenizer", BundleError, kinds=kinds)


def _load_tokenizer(folder: pathlib.Path, config: dict[str, Any]) -> tuple[Any, bool]:
    """Return the tokenizer in `folder`, and whether a text starts with its BOS."""
    # AutoTokenizer would go by model_type in config.json, which is "llava_llama" for the
    # original LLaVA: it then drops the BOS and the space in front of the first word.
    has_json = (folder / "tokenizer.json").is_file()
    if not has_json and not (folder / "tokenizer.model").is_file():
        raise BundleError(
            f"Folder {folder} has no tokenizer: expected tokenizer.json or tokenizer.model. "
            "Copy the tokenizer files from the checkpoint."
        )
    try:
        with _quiet_transformers():
            from transformers import LlamaTokenizer, PreTrainedTokenizerFast

            loader: Any = PreTrainedTokenizerFast if has_json else LlamaTokenizer
            tokenizer = loader.from_pretrained(folder, local_files_only=True)
            starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    # The Rust and the SentencePiece reader raise plain Exception and RuntimeError.
    except Exception as error:
        name = "tokenizer.json" if has_json else "tokenizer.model"
        raise BundleError(
            f"Tokenizer file {folder / name} cannot be read: {error}. Expected a complete "
            "tokenizer with its settings. Copy the tokenizer files from the checkpoint again."
        ) from error
    # LLaMA's SentencePiece model says nothing of the BOS; its tokenizer adds one by default.
    adds_bos = config.get("add_bos_token", starts_with_bos if has_json else True)
    return tokenizer, bool(adds_bos) and tokenizer.bos_token_id is not None


def _eos_token_ids(folder: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    from_generation = _settings(folder / "generation_config.json").get("eos_token_id")
    ids = from_generation if isinstance(from_generation, list) else [from_generation]
    return tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None}))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from warning of model types and packages that it does not need."""
    advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # asked when transformers is imported
    before = os.environ.get(advice)
    os.environ[advice] = "1"
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if before is None:
            del os.environ[advice]
