r"""Questions about images and their answers, from the files that LLaVA is evaluated with.

Read are LLaVA's conversations, of which the first question counts and its answer is the truth,
and question files, LLaVA's and those that lmms-eval's tasks are made of:

    [{"id": "7", "image": "cat.png", "category": "animals", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A cat."}]}]

    {"question_id": 7, "image": "cat.png", "text": "What is this?", "answer": "A cat."}
    {"question_id": 7, "image": "cat.png", "question": "What is this?", "answers": ["cat", ...]}
    {"question_id": 7, "image": "cat.png", "question": "What is this?",
     "choices": ["a dog", "a cat"], "answer": 1}

A file holds one object per line, a list of them, or an object with the list under `data`,
`questions` or `annotations`. Answers may stand in a second file, joined by `question_id`.
"""

from __future__ import annotations

import dataclasses
import logging
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dllava_export.errors import DllavaExportError
from dllava_export.evaluation.metrics.metric import Truth
from dllava_export.json_text import parse_json
from dllava_export.names import IMAGE_PLACEHOLDER
from dllava_export.prompts.data_files import answer_text, image_file, read_data_file
from dllava_export.short_text import shortened

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
_TYPE_KEYS = ("category", "answer_type", "question_type", "kind")
_TEXT_KEYS = ("text", "question")
_ANSWER_KEYS = ("answer", "answers", "gt_answers", "gt_answer", "label")
_CHOICE_KEYS = ("choices", "options")
_LIST_KEYS = ("data", "questions", "annotations")
_ID_KEYS = ("question_id", "id")
_IMAGE_NAMES = (  # of an `image_id`: as it is, TextVQA's, and COCO's years
    "{}", "{}.jpg", "{:0>12}.jpg", "COCO_val2014_{:0>12}.jpg", "COCO_train2014_{:0>12}.jpg",
    "COCO_test2015_{:0>12}.jpg",
)  # fmt: skip
_LETTERS = string.ascii_uppercase
_LETTER_REQUEST = "Answer with the option's letter from the given choices directly."


class EvaluationError(DllavaExportError):
    """Questions or bundles cannot be used for an evaluation."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of the file.

    Attributes:
        name: Where it is, for messages: `questions.json, record 3 (id '7')`, 0-based, or
            `questions.jsonl, line 3 (id '7')`, 1-based.
        type: Its `category`, `answer_type`, `question_type` or `kind`; `all` where it has none.
        text: The question, with its options, without image placeholder.
        answers: What is right; several where people answered the same question.
        image: Its image, or None.
        choices: Texts of its options A, B, C and so on; empty where it has none.
    """

    name: str
    type: str
    text: str
    answers: tuple[str, ...]
    image: Path | None
    choices: tuple[str, ...] = ()

    @property
    def truth(self) -> str:
        """The answer that is given most often, the first of several such."""
        return Counter(self.answers).most_common(1)[0][0]

    @property
    def expected(self) -> Truth:
        """What an answer is compared with."""
        return Truth(self.answers, self.choices)


def read_questions(
    path: Path,
    image_folder: Path | None = None,
    *,
    answers: Path | None = None,
    allow_outside: bool = False,
    skipped: list[str] | None = None,
) -> Iterator[Question]:
    """Yield the questions of a file.

    Args:
        path: LLaVA's JSON of conversations, or JSON objects with a question and its answer:
            one per line, or a list of them.
        image_folder: What names of images start from; the file's folder by default.
        answers: A file with the answers, by `question_id`; by default they stand beside the
            questions.
        allow_outside: Take images outside that folder.
        skipped: Gets the reason of each bad record; by default the first one raises.

    Raises:
        EvaluationError: If a file is neither, or a record is bad.
    """
    folder = path.parent if image_folder is None else image_folder
    known = None if answers is None else _AnswerFile.read(answers)
    for place, entry in _read_entries(path):
        try:
            joined = entry if known is None else known.join(entry, place)
            yield _parse_question(joined, place, folder, allow_outside)
        except EvaluationError as error:
            skip_or_raise(error, skipped)


def skip_or_raise(error: EvaluationError, skipped: list[str] | None) -> None:
    """Count a bad record; raise its error where `skipped` is None."""
    if skipped is None:
        raise error
    logger.warning("skipped: %s", error)
    skipped.append(str(error))


def _read_entries(path: Path) -> list[tuple[str, Any]]:
    """Return the records of a file, each with its place; a bad line is an error in its place."""
    try:
        content = read_data_file(path)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error}), expected questions in JSON. Check the path."
        ) from error
    whole = _parse_whole(path, content)
    if whole is not None:
        return [(f"{path.name}, record {number}", entry) for number, entry in enumerate(whole)]
    # `splitlines` would part a line where a text in it holds U+2028 or U+0085.
    return [
        (f"{path.name}, line {number}", _parse_line(line))
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip()
    ]


def _parse_whole(path: Path, content: str) -> list[Any] | None:
    """Return the records of a file that is one JSON value; None for an object per line."""
    start = content.lstrip()[:1]
    try:
        value = parse_json(content) if start in ("[", "{") else None
    except ValueError as error:
        if start == "{":
            return None
        raise EvaluationError(
            f"{path} cannot be read as JSON ({error}), expected a list of records. Restore "
            "the file."
        ) from error
    if isinstance(value, dict):
        listed = next((value[k] for k in _LIST_KEYS if isinstance(value.get(k), list)), None)
        is_one_line = "\n" not in content.strip()
        return [value] if listed is None and not is_one_line else listed
    return value


def _parse_line(line: str) -> Any:
    """Return the record of a line, or what is wrong with it: only this record is bad."""
    try:
        return parse_json(line)
    except ValueError as error:
        return error


@dataclasses.dataclass(frozen=True)
class _AnswerFile:
    """Answers in a file of their own.

    Attributes:
        path: The file.
        records: By id as text, since one tool writes 7 and another "7".
    """

    path: Path
    records: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> _AnswerFile:
        records: dict[str, Mapping[str, Any]] = {}
        for place, entry in _read_entries(path):
            _check_object(entry, place, "Correct it.")  # without it nothing can be skipped
            identity = _identity(entry)
            if identity is None:
                raise EvaluationError(
                    f"{place} has no question_id, expected one in every record of answers. "
                    "Correct it."
                )
            if identity in records:
                raise EvaluationError(
                    f"{place} has the question_id {identity!r}, which an earlier record has "
                    "too; expected one record for each question. Correct it."
                )
            records[identity] = entry
        return cls(path, records)

    def join(self, entry: Any, place: str) -> Any:
        """Return a record of questions with what the answers say about it."""
        _check_object(entry, place)
        if "conversations" in entry:
            raise EvaluationError(
                f"{place} has conversations, which hold their answers; expected a question "
                f"whose answer is in {self.path.name}. Leave out --answers."
            )
        identity = _identity(entry)
        if identity is None:
            raise EvaluationError(
                f"{place} has no question_id, expected one by which its answer in "
                f"{self.path.name} is found. {REMEDY}"
            )
        if identity not in self.records:
            raise EvaluationError(
                f"{place} (id {identity!r}) has no answer in {self.path.name}, expected a "
                f"record with that question_id. {REMEDY}"
            )
        known = dict(self.records[identity])
        text = known.pop("text", None)
        if all(known.get(key) is None for key in _ANSWER_KEYS):
            known["answer"] = text  # LLaVA's files of answers: what somebody said is the text
        return {**known, **{k: v for k, v in entry.items() if v is not None}}


def _identity(entry: Mapping[str, Any]) -> str | None:
    key = _identity_key(entry)
    return None if key is None else str(entry[key])


def _identity_key(entry: Mapping[str, Any]) -> str | None:
    return next((key for key in _ID_KEYS if entry.get(key) is not None), None)


def _check_object(entry: Any, place: str, remedy: str = REMEDY) -> None:
    if isinstance(entry, ValueError):
        raise EvaluationError(
            f"{place} cannot be read as JSON ({entry}), expected an object in each line, or one "
            f"list in the whole file. {remedy}"
        )
    if not isinstance(entry, dict):
        raise EvaluationError(
            f"{place} is a JSON {type(entry).__name__}, expected an object with conversations, "
            f"or with text and answer. {remedy}"
        )


def _parse_question(
    entry: Any, place: str, image_folder: Path, allow_outside: bool
) -> Question:
    """Read a record by the rules of the training data, with its first question only."""
    from dllava_export.training.data import parse_record
    from dllava_export.training.settings import BadRecordError

    _check_object(entry, place)
    key = _identity_key(entry)
    name = place if key is None else f"{place} (id {entry[key]!r})"
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] | None = None
    if "conversations" in entry:
        turns = entry["conversations"]
        entry = {**entry, "conversations": turns[:2] if isinstance(turns, list) else turns}
    else:
        choices = _choices(entry, name)
        answers = _answers(entry, name, choices)
        image = _image_name(entry, name, image_folder)
        entry = _as_conversation(entry, name, answers[0], choices, image)
    try:
        named = entry if key is None else {**entry, "id": entry[key]}
        record = parse_record(
            named, place, image_folder, needs_image=False, allow_outside=allow_outside
        )
    except BadRecordError as error:
        raise EvaluationError(str(error)) from error
    question_type = next((entry[key] for key in _TYPE_KEYS if key in entry), _DEFAULT_TYPE)
    if not isinstance(question_type, str) or question_type in ("", TOTAL):
        raise EvaluationError(
            f"{record.name} has the question type {question_type!r}, expected a text other than "
            f"{TOTAL!r}. {REMEDY}"
        )
    ((text, truth),) = record.turns
    return Question(
        record.name, question_type, text, answers or (truth,), record.image, choices
    )


def _as_conversation(
    entry: Mapping[str, Any],
    name: str,
    answer: str,
    choices: tuple[str, ...],
    image: str | None,
) -> dict[str, Any]:
    """Bring a record of a question file into the form of a conversation."""
    key = next((key for key in _TEXT_KEYS if key in entry), None)
    text = entry[key] if key else None
    if not isinstance(text, str) or not text.strip():
        found = f"has the {key} {text!r}" if key else f"has no {' or '.join(_TEXT_KEYS)}"
        raise EvaluationError(f"{name} {found}, expected the question as text. {REMEDY}")
    text = text.replace(IMAGE_PLACEHOLDER, "").strip()
    options = [
        f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)
    ]
    if any(option not in text for option in options):
        text = "\n".join((text, *options, _LETTER_REQUEST))
    if image is not None:
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {**entry, "image": image, "conversations": turns}


def _choices(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the texts of the options: of a list, or of keys `A`, `B` or `choice_a`."""
    key = next((key for key in _CHOICE_KEYS if entry.get(key) is not None), None)
    if key is None:
        return _lettered(entry, "{}", str.upper) or _lettered(entry, "choice_{}", str.lower)
    values = entry[key]
    found = [answer_text(value) for value in values] if isinstance(values, list) else []
    if not 2 <= len(found) <= len(_LETTERS) or not all(isinstance(v, str) for v in found):
        raise EvaluationError(
            f"{name} has the {key} {shortened(values)!r}, expected a list of 2 to "
            f"{len(_LETTERS)} texts. {REMEDY}"
        )
    return tuple(found)


def _lettered(entry: Mapping[str, Any], form: str, case: Any) -> tuple[str, ...]:
    """Return the options A, B and so on, up to the first that is missing or no text."""
    found = []
    for letter in _LETTERS:
        value = answer_text(entry.get(form.format(case(letter))))
        if not isinstance(value, str) or value.strip() in ("", "nan"):
            break  # MMBench's tables have `nan` where there are fewer options
        found.append(value)
    return tuple(found) if len(found) > 1 else ()


def _answers(entry: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Return the answers that are right, as texts; of a multiple choice, letters."""
    key = next((key for key in _ANSWER_KEYS if entry.get(key) is not None), None)
    if key is None:
        raise EvaluationError(
            f"{name} has no {_ANSWER_KEYS[0]!r}, expected the answer as text, a number or a "
            f"list of them, or a file of answers with --answers. {REMEDY}"
        )
    value = entry[key]
    values = value if isinstance(value, list) else [value]
    texts = [_one_answer(one, choices) for one in values]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise EvaluationError(
            f"{name} has the {key} {shortened(value)!r}, expected the answer as text, a number "
            f"or a list of them. {REMEDY}"
        )
    return tuple(texts)


def _one_answer(value: Any, choices: tuple[str, ...]) -> Any:
    """Return an answer as text; of a multiple choice its letter. Anything else as it is."""
    if isinstance(value, dict):  # VQA: {"answer": "cat", "answer_confidence": "yes"}
        value = value.get("answer")
    if choices and type(value) is int and 0 <= value < len(choices):
        return _LETTERS[value]  # ScienceQA counts from 0
    text = answer_text(value)
    if choices and text in choices and text not in _LETTERS[: len(choices)]:
        return _LETTERS[choices.index(text)]
    return text


def _image_name(entry: Mapping[str, Any], name: str, folder: Path) -> str | None:
    """Return the name of a record's picture; None without one."""
    given = entry.get("image")
    if given is None:
        identity = entry.get("image_id")
        return None if identity is None else _image_of_id(identity, name, folder)
    image = given[0] if isinstance(given, list) and len(given) == 1 else given
    if isinstance(image, dict):  # as the datasets library writes it
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise EvaluationError(
            f"{name} has the image {shortened(given)!r}, expected the name of one file. {REMEDY}"
        )
    return image


def _image_of_id(identity: Any, name: str, folder: Path) -> str:
    """Return the name that is there of those which datasets give to the picture of an id."""
    names = [form.format(str(identity)) for form in _IMAGE_NAMES]
    for one in names:
        # Whether it may lie outside is checked later, with all other names.
        if image_file(folder, one, allow_outside=True) is not None:
            return one
    raise EvaluationError(
        f"{name} has no image, and of its image_id {identity!r} none is in {folder}, expected "
        f"one of {', '.join(names)}. Name their folder with --image-folder, or use "
        "--on-bad-record skip."
    )
