r"""Questions about images and their answers, from the files that LLaVA is evaluated with.

Read are LLaVA's conversations, of which the first question counts and its answer is the truth,
and question files:

    [{"id": "7", "image": "cat.png", "category": "animals", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A cat."}]}]

    {"question_id": 7, "image": "cat.png", "text": "What is this?", "answer": "A cat."}
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dllava_export.errors import DllavaExportError
from dllava_export.json_text import parse_json
from dllava_export.names import IMAGE_PLACEHOLDER

__all__ = [
    "REMEDY",
    "TOTAL",
    "EvaluationError",
    "Question",
    "read_questions",
    "skip_or_raise",
]

logger = logging.getLogger(__name__)

TOTAL = "total"
"""Stands for all question types together, so no question may be of this type."""

REMEDY = "Correct it, or use --on-bad-record skip."

_DEFAULT_TYPE = "all"
_TYPE_KEYS = ("category", "question_type", "kind")


class EvaluationError(DllavaExportError):
    """Questions or bundles cannot be used for an evaluation."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of the file.

    Attributes:
        name: Where it is, for messages: `questions.json, record 3 (id '7')`; 0-based.
        type: Its `category`, `question_type` or `kind`; `all` where it has none.
        text: The question, without image placeholder.
        truth: The answer expected.
        image: Its image, or None.
    """

    name: str
    type: str
    text: str
    truth: str
    image: Path | None


def read_questions(
    path: Path, image_folder: Path | None = None, *, skipped: list[str] | None = None
) -> Iterator[Question]:
    """Yield the questions of a file.

    Args:
        path: LLaVA's JSON of conversations, or JSON objects with `text` and `answer`: one per
            line, or a list of them.
        image_folder: What names of images start from; the file's folder by default.
        skipped: Gets the reason of each bad record; by default the first one raises.

    Raises:
        EvaluationError: If the file is neither, or a record is bad.
    """
    folder = path.parent if image_folder is None else image_folder
    for number, entry in enumerate(_read_entries(path)):
        try:
            yield _parse_question(entry, f"{path.name}, record {number}", folder)
        except EvaluationError as error:
            skip_or_raise(error, skipped)


def skip_or_raise(error: EvaluationError, skipped: list[str] | None) -> None:
    """Count a bad record; raise its error where `skipped` is None."""
    if skipped is None:
        raise error
    logger.warning("skipped: %s", error)
    skipped.append(str(error))


def _read_entries(path: Path) -> list[Any]:
    """Return the records of a JSON list, or of one JSON object per line."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error}), expected questions in JSON. Check the path."
        ) from error
    if content.lstrip().startswith("["):
        try:
            return parse_json(content)
        except ValueError as error:
            raise EvaluationError(
                f"{path} cannot be read as JSON ({error}), expected a list of records. Restore "
                "the file."
            ) from error
    return [_parse_line(line) for line in content.splitlines() if line.strip()]


def _parse_line(line: str) -> Any:
    """Return the record of a line, or what is wrong with it: only this record is bad."""
    try:
        return parse_json(line)
    except ValueError as error:
        return error


def _parse_question(entry: Any, place: str, image_folder: Path) -> Question:
    """Read a record by the rules of the training data, with its first question only."""
    from dllava_export.training.data import parse_record
    from dllava_export.training.settings import BadRecordError

    if isinstance(entry, ValueError):
        raise EvaluationError(
            f"{place} cannot be read as JSON ({entry}), expected an object in each line, or one "
            f"list in the whole file. {REMEDY}"
        )
    if not isinstance(entry, dict):
        raise EvaluationError(
            f"{place} is a JSON {type(entry).__name__}, expected an object with conversations, "
            f"or with text and answer. {REMEDY}"
        )
    if "conversations" in entry:
        turns = entry["conversations"]
        entry = {**entry, "conversations": turns[:2] if isinstance(turns, list) else turns}
    else:
        entry = _as_conversation(entry, place)
    try:
        record = parse_record(entry, place, image_folder, needs_image=False)
    except BadRecordError as error:
        raise EvaluationError(str(error)) from error
    question_type = next((entry[key] for key in _TYPE_KEYS if key in entry), _DEFAULT_TYPE)
    if not isinstance(question_type, str) or question_type in ("", TOTAL):
        raise EvaluationError(
            f"{record.name} has the question type {question_type!r}, expected a text other than "
            f"{TOTAL!r}. {REMEDY}"
        )
    ((text, truth),) = record.turns
    return Question(record.name, question_type, text, truth, record.image)


def _as_conversation(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Bring a line of a question file into the form of a conversation."""
    name = f"{place} (id {entry['question_id']!r})" if "question_id" in entry else place
    for key, what in (("text", "question"), ("answer", "answer")):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            found = f"has no {key!r}" if key not in entry else f"has the {key} {value!r}"
            raise EvaluationError(f"{name} {found}, expected the {what} as text. {REMEDY}")
    text = entry["text"].replace(IMAGE_PLACEHOLDER, "").strip()
    if entry.get("image") is not None:
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": entry["answer"]}]
    identity = {"id": entry["question_id"]} if "question_id" in entry else {}
    return {**entry, **identity, "conversations": turns}
