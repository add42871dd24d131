"""How conversations are written: LLaVA's prompt templates, and those beside a tokenizer.

Source    LLaVA, `llava/conversation.py`: conv_vicuna_v1, conv_llava_llama_2,
          conv_mistral_instruct, conv_chatml_direct, conv_llava_plain.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dllava_export.errors import BundleError, InvalidInputError, SettingError
from dllava_export.families.config_file import read_json
from dllava_export.names import IMAGE_PLACEHOLDER
from dllava_export.short_text import shortened

__all__ = [
    "CHECKPOINT_TEMPLATE",
    "TEMPLATES",
    "TEMPLATE_FILE",
    "Conversation",
    "JinjaTemplate",
    "NamedTemplate",
    "find_template",
    "named_templates",
    "read_template_file",
]

CHECKPOINT_TEMPLATE = "checkpoint"
"""Stands for the template beside the tokenizer: the checkpoint's own, or the user's file."""

TEMPLATE_FILE = "chat_template.jinja"
"""Where a template lies beside a tokenizer."""

_MAX_FILE_BYTES = 1 << 20

Place = Literal["before", "after"]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is to be written.

    Attributes:
        questions: What the user asked, oldest first; the last one waits for its answer.
        answers: One for each question but the last.
        image: Where the image stands, seen from its question; None without one.
        image_turn: The question that the image belongs to.
        system: What stands before everything; None for the template's own.
    """

    questions: Sequence[str]
    answers: Sequence[str] = ()
    image: Place | None = None
    image_turn: int = 0
    system: str | None = None

    def questions_with_image(self) -> list[str]:
        """Return the questions, one of them with the placeholder on a line of its own."""
        texts = list(self.questions)
        if self.image is not None and self.image_turn < len(texts):
            lines = [texts[self.image_turn]]
            lines.insert(0 if self.image == "before" else 1, IMAGE_PLACEHOLDER)
            texts[self.image_turn] = "\n".join(lines)
        return texts


@dataclasses.dataclass(frozen=True)
class NamedTemplate:
    """A template that is known by name.

    Attributes:
        name: Of the template.
        system: What it puts before everything.
        write: Gives the text of a system text, questions and answers.
    """

    name: str
    system: str
    write: Callable[[str, Sequence[str], Sequence[str]], str]

    def render(self, conversation: Conversation) -> str:
        """Return a conversation as text, up to where the next answer starts."""
        system = self.system if conversation.system is None else conversation.system
        return self.write(system, conversation.questions_with_image(), conversation.answers)


def _write_vicuna(system: str, questions: Sequence[str], answers: Sequence[str]) -> str:
    text = f"{system} " if system else ""
    for question, answer in zip(questions, answers, strict=False):
        text += f"USER: {question} ASSISTANT: {answer}</s>"
    return f"{text}USER: {questions[-1]} ASSISTANT:"


def _write_inst(start: str) -> Callable[[str, Sequence[str], Sequence[str]], str]:
    def write(system: str, questions: Sequence[str], answers: Sequence[str]) -> str:
        first, *others = questions
        wrapped = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        text = f"[INST] {wrapped}{first} [/INST]"  # the tokenizer puts its BOS in front
        for answer, question in zip(answers, others, strict=True):
            text += f" {answer} </s>{start}[INST] {question} [/INST]"
        return text

    return write


def _write_chatml(system: str, questions: Sequence[str], answers: Sequence[str]) -> str:
    text = f"<|im_start|>system\n{system}<|im_end|>"
    for number, question in enumerate(questions):
        text += f"<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n"
        if number < len(answers):
            text += f"{answers[number]}<|im_end|>"
    return text


def _write_plain(system: str, questions: Sequence[str], answers: Sequence[str]) -> str:
    text = system
    for number, question in enumerate(questions):
        text += f"{question}\n"
        if number < len(answers):
            text += f"{answers[number]}\n"
    return text


TEMPLATES: tuple[NamedTemplate, ...] = (
    NamedTemplate(
        "vicuna_v1",
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.",
        _write_vicuna,
    ),
    NamedTemplate(
        "llama_2",
        "You are a helpful language and vision assistant. You are able to understand the "
        "visual content that the user provides, and assist the user with a variety of tasks "
        "using natural language.",
        _write_inst("<s>"),
    ),
    NamedTemplate("mistral_instruct", "", _write_inst("")),
    NamedTemplate("chatml", "Answer the questions.", _write_chatml),
    NamedTemplate("plain", "", _write_plain),
)


def named_templates() -> tuple[str, ...]:
    """Return the names of the templates that need no file."""
    return tuple(template.name for template in TEMPLATES)


class JinjaTemplate:
    """A chat template in jinja2, as it lies beside a tokenizer.

    Args:
        source: The template.
        place: Where it comes from, for messages.
        special_tokens: `bos_token` and others that a template may write.
    """

    def __init__(self, source: str, place: str, special_tokens: Mapping[str, str]) -> None:
        self._source, self._place = source, place
        self._special_tokens = dict(special_tokens)
        self._run: Callable[[Mapping[str, Any]], str] | None = None
        self._lock = threading.Lock()  # a template counts what it does in one run

    def render(self, conversation: Conversation) -> str:
        """Return a conversation as text, up to where the next answer starts.

        Raises:
            BundleError: If the template cannot be run, runs too long, or leaves out image or
                system text.
        """
        variables = {
            "messages": _messages(conversation),
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self._special_tokens,
        }
        text = self._text(variables)
        count = int(conversation.image is not None)
        if text.count(IMAGE_PLACEHOLDER) != count:
            raise BundleError(
                f"The chat template in {self._place} writes {text.count(IMAGE_PLACEHOLDER)} "
                f"times {IMAGE_PLACEHOLDER!r}, expected {count}. {_ADVICE}"
            )
        if conversation.system and conversation.system.strip() not in text:
            raise InvalidInputError(
                f"The chat template in {self._place} leaves out the system text, expected it "
                "in the conversation. Leave --system out, or write it into the question."
            )
        return text

    def _text(self, variables: Mapping[str, Any]) -> str:
        from dllava_export.families.template_sandbox import compile_template

        try:
            with self._lock:
                if self._run is None:
                    self._run = compile_template(self._source)
                return self._run(variables)
        # A template is a program: it can fail in as many ways.
        except Exception as error:
            reason = shortened(error, 300) or type(error).__name__
            raise BundleError(
                f"The chat template in {self._place} cannot be applied: {reason}. Expected one "
                f"for messages with lists of text and images. {_ADVICE}"
            ) from error


_ADVICE = (
    "Copy the template from the checkpoint again, or export with --chat-template "
    f"{'|'.join(named_templates())}|FILE."
)


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    messages = []
    if conversation.system is not None:
        messages.append(_message("system", conversation.system))
    for number, question in enumerate(conversation.questions):
        asked = _message("user", question)
        if conversation.image is not None and number == conversation.image_turn:
            place = 0 if conversation.image == "before" else 1
            asked["content"].insert(place, {"type": "image"})
        messages.append(asked)
        if number < len(conversation.answers):
            messages.append(_message("assistant", conversation.answers[number]))
    return messages


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def find_template(folder: Path) -> str | None:
    """Return the chat template in a folder with a tokenizer, or None.

    Raises:
        BundleError: If a file that may hold it cannot be read.
    """
    if (folder / TEMPLATE_FILE).is_file():
        return read_template_file(folder / TEMPLATE_FILE, BundleError)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        value = read_json(path, "a folder with a tokenizer", BundleError).get("chat_template")
        if isinstance(value, list):  # several by name
            named = {
                entry.get("name"): entry.get("template")
                for entry in value
                if isinstance(entry, dict)
            }
            value = named.get("default")
        if isinstance(value, str):
            return value
    return None


def read_template_file(
    path: Path, error_type: type[BundleError] | type[SettingError] = SettingError
) -> str:
    """Return the chat template in a file.

    Raises:
        DllavaExportError: Of `error_type`, if the file is no text, or far too large.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
            raise error_type(
                f"{path} is no chat template: expected a file of jinja2 text of at most "
                f"{_MAX_FILE_BYTES} bytes. Name the file, or one of "
                f"{', '.join(named_templates())}."
            )
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise error_type(
            f"The chat template {path} cannot be read ({error}), expected UTF-8 text. Restore "
            "the file."
        ) from error
