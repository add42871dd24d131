"""Prompts to token ids and back: chat templates, image placeholder, streamed text."""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dllava_export.errors import BundleError, InvalidInputError, SettingError
from dllava_export.families.chat_templates import (
    CHECKPOINT_TEMPLATE,
    TEMPLATES,
    Conversation,
    JinjaTemplate,
    NamedTemplate,
    Place,
    find_template,
    named_templates,
)
from dllava_export.families.config_file import MAX_VOCAB_SIZE, quiet_transformers, read_json
from dllava_export.families.config_kinds import TOKENIZER_KINDS
from dllava_export.families.special_token_ids import end_ids, stated_ids
from dllava_export.names import IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.control_tokens import ControlTokens
from dllava_export.prompts.prompt_text import checked_text
from dllava_export.short_text import shortened

__all__ = ["ChatTokenizer", "RenderedPrompt", "StreamDecoder"]

logger = logging.getLogger(__name__)

_NAMED = {template.name: template for template in TEMPLATES}
_INCOMPLETE = "\ufffd"
_VICUNA_ROLES = re.compile(r"\bUSER:.*\bASSISTANT:", re.DOTALL)
# Stand for an answer before a further question: some form no token with what follows them.
_NEUTRAL_ANSWERS = ("x", "?", "1", ")")

Turns = Sequence[tuple[str, str]]


class RenderedPrompt(str):
    """A conversation as text, which `encode` can tell from what users wrote in it.

    Attributes:
        marked: The text with control tokens that users typed marked as such.
    """

    marked: str

    def __new__(cls, text: str, marked: str) -> RenderedPrompt:
        """Return both forms of a text as one value."""
        self = super().__new__(cls, text)
        self.marked = marked
        return self


class ChatTokenizer:
    """A tokenizer together with the chat template its model was trained on.

    Make one with `from_folder`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: NamedTemplate | JinjaTemplate,
        image_token_id: int,
        adds_bos: bool,
        eos_token_ids: tuple[int, ...],
        folder: pathlib.Path,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._image_token_id = image_token_id
        self._bos_id = tokenizer.bos_token_id if adds_bos else None
        self._eos_token_ids = eos_token_ids
        self._folder = folder
        self._controls = ControlTokens(
            tokenizer.backend_tokenizer,
            {*tokenizer.all_special_ids, *eos_token_ids, image_token_id},
        )
        has_image_token = tokenizer.get_vocab().get(IMAGE_PLACEHOLDER) == image_token_id
        self._is_whole = has_image_token and isinstance(template, JinjaTemplate)

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
            template: `vicuna_v1` (original LLaVA and Dynamic-LLaVA), another one of
                `families.chat_templates`, or `checkpoint`, the chat template in the folder.
            image_token_id: The id the checkpoint's config gives the image token: -200, or one
                of the vocabulary.

        Raises:
            BundleError: If no tokenizer can be read, or `checkpoint` is asked for and the
                folder has no chat template.
            SettingError: If there is no such template.
        """
        folder = pathlib.Path(folder)
        if template not in (*named_templates(), CHECKPOINT_TEMPLATE):
            raise SettingError(
                f"template must be one of {', '.join(named_templates())}, "
                f"{CHECKPOINT_TEMPLATE}, got {template!r}."
            )
        config = _settings(folder / "tokenizer_config.json")
        tokenizer, adds_bos = _load_tokenizer(folder, config)
        chosen: NamedTemplate | JinjaTemplate
        if template == CHECKPOINT_TEMPLATE:
            chosen = _jinja_template(folder, tokenizer)
        else:
            chosen = _NAMED[template]
        return cls(
            tokenizer,
            template=chosen,
            image_token_id=image_token_id,
            adds_bos=adds_bos,
            eos_token_ids=_eos_token_ids(folder, tokenizer),
            folder=folder,
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, ascending; empty where the folder names none."""
        return self._eos_token_ids

    @property
    def special_ids(self) -> dict[str, int]:
        """`bos`, `eos`, `pad` and `unk` → id, of those that there are."""
        found = {
            role: getattr(self._tokenizer, f"{role}_token_id")
            for role in ("bos", "eos", "pad", "unk")
        }
        return {role: token for role, token in found.items() if token is not None}

    def render(
        self,
        prompt: str,
        *,
        with_image: bool,
        history: Turns = (),
        system: str | None = None,
        raw: bool = False,
        allow_special: bool = False,
    ) -> RenderedPrompt:
        """Return the whole conversation as the model was trained to read it.

        Args:
            prompt: The user's question. Where it is the first one and there is an image, an
                `<image>` at its start or end says where the image stands; elsewhere `<image>`
                is text.
            with_image: Whether the conversation is about an image. Its placeholder stands
                before the first question by default.
            history: Earlier (question, answer) pairs, oldest first.
            system: What stands before everything; None for the template's own.
            raw: `prompt` is a whole conversation already, `<image>` in the image's place; no
                template is put around it.
            allow_special: Control tokens in questions, answers and system text (`</s>`) are
                control tokens; by default they are text.

        Raises:
            InvalidInputError: If a text is none, or `<image>` stands in it several times where
                the image's place is.
            BundleError: If the checkpoint's chat template fails, or leaves the image out.
        """
        if raw:
            marked = self._raw(prompt, with_image, history, system, allow_special)
            return RenderedPrompt(self._controls.unmarked(marked), marked)
        first, *others = [
            checked_text(q, "A question") for q in (*(t[0] for t in history), prompt)
        ]
        first, image = _image_place(first, with_image)
        self._warn_of_roles(prompt)
        if system is not None:
            system = self._marked(checked_text(system, "The system text"), allow_special)
        conversation = Conversation(
            [self._marked(question, allow_special) for question in (first, *others)],
            [self._marked(checked_text(t[1], "An answer"), allow_special) for t in history],
            image,
            system=system,
        )
        marked = self._template.render(conversation)
        return RenderedPrompt(self._controls.unmarked(marked), marked)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a rendered conversation.

        With a template that is known by name the pieces around `<image>` are tokenised one by
        one and joined with -200, so that each piece starts as a text of its own (LLaVA's
        `tokenizer_image_token`). With `checkpoint` the text is tokenised as a whole, where the
        tokenizer has an image token, and that token's id becomes -200: what the checkpoint's
        own processor does. One BOS stands at the start, if the tokenizer adds one at all.

        Args:
            text: What `render` returns: control tokens that a user typed in it are text. In
                any other string they are control tokens.

        Returns:
            [seq_len], int64. Token ids, and -200 for each `<image>`.

        Raises:
            InvalidInputError: If it is no text, or the tokenizer makes a control token of what a
                user typed.
        """
        marked = text.marked if isinstance(text, RenderedPrompt) else text
        ids = self._ids(checked_text(marked, "A text"))
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
        template = _NAMED["vicuna_v1"]
        asked = [self._marked(question, False) for question, _ in turns]
        answers = [self._marked(answer, False) for _, answer in turns]
        place: Place | None = None if image_turn is None else "before"
        text = ""
        spans = []
        for number, answer in enumerate(answers):
            known = Conversation(
                asked[: number + 1], answers[:number], place, image_turn=image_turn or 0
            )
            prompt = template.render(known)
            text = f"{prompt} {answer}</s>"
            spans.append((prompt, text))
        ids = self._with_bos(text)
        is_answer = np.zeros(len(ids), bool)
        for prompt, answered in spans:
            # Tokens up to the first that the text behind it changes: those the model is fed.
            start, end = (
                _num_shared(self._with_bos(part) if part != text else ids, ids)
                for part in (prompt, answered)
            )
            is_answer[start:end] = True
        return ids, is_answer

    def encode_follow_up(
        self, prompt: str, *, raw: bool = False, allow_special: bool = False
    ) -> np.ndarray:
        """Return the ids to feed on top of a KV cache for a further question.

        They stand for everything the template puts after an answer: with `vicuna_v1` the
        `</s>` that closes it, `USER: {prompt} ASSISTANT:`; no BOS and no image. The `</s>` is
        among them because generation that stops on it has not fed it. Tokens of the answer
        that were sampled but not fed (the last one, where generation stopped by length) are
        the caller's to put in front.

        They are the ids of the whole conversation behind the answer's, wherever the answer's
        last characters form no token with what follows: those have been fed already.

        Args:
            prompt: The user's question.
            raw: It is all that is fed; no template is put around it.
            allow_special: See `render`.

        Returns:
            [seq_len], int64. Token ids.

        Raises:
            InvalidInputError: If the question is no text.
            BundleError: If the checkpoint's chat template fails, or leaves the answer out.
        """
        if raw:
            before = ""
            follow_up = self._raw(prompt, False, (), None, allow_special)
        else:
            before, follow_up = self._around_answer(prompt, allow_special)
        found = []
        for answer in _NEUTRAL_ANSWERS:
            answered = self._ids(before + answer)
            whole = self._ids(before + answer + follow_up)
            if whole[: len(answered)] == answered:
                found.append(whole[len(answered) :])
        # An answer that makes a word with what follows it leaves less.
        ids = max(found, key=len) if found else self._ids(follow_up)
        return np.array(ids, np.int64)

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

    def _with_bos(self, marked: str) -> np.ndarray:
        return self.encode(RenderedPrompt(marked, marked))

    def _ids(self, marked: str) -> list[int]:
        if self._is_whole:
            image_id = self._image_token_id
            return [
                IMAGE_PLACEHOLDER_ID if token == image_id else token
                for token in self._controls.ids(marked)
            ]
        first, *others = marked.split(IMAGE_PLACEHOLDER)
        ids = self._controls.ids(first)
        for piece in others:
            ids += [IMAGE_PLACEHOLDER_ID, *self._controls.ids(piece)]
        return ids

    def _marked(self, text: str, allow_special: bool) -> str:
        return self._controls.marked(text, allow_special=allow_special)

    def _raw(
        self,
        prompt: str,
        with_image: bool,
        history: Turns,
        system: str | None,
        allow_special: bool,
    ) -> str:
        """Return a whole conversation that the user wrote, marked."""
        prompt = checked_text(prompt, "A raw prompt")
        if history or system is not None:
            raise InvalidInputError(
                "A raw prompt was given with a system text or earlier turns, expected it to "
                "hold the whole conversation. Write them into the prompt."
            )
        typed = None if allow_special else self._controls.typed_in(prompt)
        if typed is not None:
            logger.warning(
                "the raw prompt holds %r, which is encoded as text: pass allow_special=True "
                "(--allow-special) for the control token",
                typed,
            )
        if not with_image:
            return self._marked(prompt, allow_special)
        pieces = prompt.split(IMAGE_PLACEHOLDER)
        if len(pieces) != 2:
            raise InvalidInputError(
                f"The raw prompt {shortened(repr(prompt))} holds {len(pieces) - 1} times "
                f"{IMAGE_PLACEHOLDER!r}, expected it once, where the image belongs."
            )
        return IMAGE_PLACEHOLDER.join(self._marked(piece, allow_special) for piece in pieces)

    def _around_answer(self, prompt: str, allow_special: bool) -> tuple[str, str]:
        """Return what a template writes before an answer, and after it with a question."""
        question = self._marked(checked_text(prompt, "A question"), allow_special)
        self._warn_of_roles(prompt)
        mark = self._controls.answer_mark
        # The first round is about an image: a template may refuse a conversation without one.
        text = self._template.render(Conversation(["?", question], [mark], "before"))
        before, found, after = text.rpartition(mark)
        if not found:
            raise BundleError(
                f"The chat template in {self._folder} leaves out earlier answers; expected "
                "them in the text. Start a new conversation for each question."
            )
        return before, after

    @functools.cached_property
    def _answer_role(self) -> str:
        """What the template writes between a question and its answer."""
        mark = self._controls.answer_mark
        try:
            alone = self._template.render(Conversation([mark], image="before"))
        except BundleError:  # of no use here, and its own conversation may be all right
            return ""
        return alone.rpartition(mark)[2].strip()

    def _warn_of_roles(self, prompt: str) -> None:
        """Say so where a question is a conversation already."""
        role = self._answer_role
        if _VICUNA_ROLES.search(prompt) or (role and role in prompt):
            logger.warning(
                "the prompt %s holds a chat template's roles, and is put into the template "
                "again: pass raw_prompt=True (--raw-prompt) for a prompt that is whole",
                shortened(repr(prompt)),
            )


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


def _image_place(question: str, with_image: bool) -> tuple[str, Place | None]:
    """Return a question without the placeholder at its start or end, and the image's place."""
    start, end = question.lstrip(), question.rstrip()
    leads, ends = start.startswith(IMAGE_PLACEHOLDER), end.endswith(IMAGE_PLACEHOLDER)
    if not with_image:
        if leads or ends:
            logger.warning(
                "the prompt %s has a place for an image, and none was given: %s is text",
                shortened(repr(question)),
                IMAGE_PLACEHOLDER,
            )
        return question, None
    place: Place = "before"
    if leads:
        question = start.removeprefix(IMAGE_PLACEHOLDER).lstrip()
    elif ends:
        question, place = end.removesuffix(IMAGE_PLACEHOLDER).rstrip(), "after"
    if (leads or ends) and (
        question.startswith(IMAGE_PLACEHOLDER) or question.rstrip().endswith(IMAGE_PLACEHOLDER)
    ):
        raise InvalidInputError(
            f"The prompt has several places for an image ({IMAGE_PLACEHOLDER!r}), expected one, "
            "since one image per prompt is supported. Remove the others."
        )
    return question, place


def _num_shared(start: np.ndarray, ids: np.ndarray) -> int:
    """Return how many ids are the same from the start on."""
    num = min(len(start), len(ids))
    differs = np.flatnonzero(start[:num] != ids[:num])
    return int(differs[0]) if differs.size else num


def _jinja_template(folder: pathlib.Path, tokenizer: Any) -> JinjaTemplate:
    source = find_template(folder)
    if source is None:
        raise BundleError(
            f"Folder {folder} has no chat template: expected chat_template.jinja, "
            "chat_template.json, or 'chat_template' in tokenizer_config.json. Copy it from the "
            f"checkpoint, or export with --chat-template {'|'.join(named_templates())}|FILE."
        )
    special = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    return JinjaTemplate(source, str(folder), special)


def _settings(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    return read_json(path, "a folder with a tokenizer", BundleError, kinds=TOKENIZER_KINDS)


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
        with quiet_transformers():
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
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= MAX_VOCAB_SIZE:  # the tokenizers library has a table up to the largest
        raise BundleError(
            f"The tokenizer in {folder} has the token id {largest}, expected ids below "
            f"{MAX_VOCAB_SIZE}. Copy the tokenizer files from the checkpoint again."
        )
    # LLaMA's SentencePiece model says nothing of the BOS; its tokenizer adds one by default.
    adds_bos = config.get("add_bos_token", starts_with_bos if has_json else True)
    return tokenizer, bool(adds_bos) and tokenizer.bos_token_id is not None


def _eos_token_ids(folder: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    stated = stated_ids(folder)
    own = tokenizer.eos_token_id
    ends = {} if own is None else {"tokenizer": (int(own),)}
    return end_ids({**stated, "eos": {**stated["eos"], **ends}})
