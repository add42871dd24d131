"""Conversations about images: LLaVA's JSON to token ids, labels and pixel values.

    [{"id": "7", "image": "cat.png", "conversations": [
        {"from": "human", "value": "<image> What is this?"},
        {"from": "gpt", "value": "A cat."}]}]

Every record is checked before training starts; only whether an image can be decoded shows when
it is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dllava_export.errors import InvalidInputError
from dllava_export.json_text import parse_json
from dllava_export.names import IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.data_files import (
    OutsideError,
    answer_text,
    image_file,
    read_data_file,
)
from dllava_export.prompts.images import ImageProcessor
from dllava_export.prompts.tokenizer import ChatTokenizer
from dllava_export.short_text import shortened
from dllava_export.training.settings import BadRecordError, TrainingError

if TYPE_CHECKING:
    import torch

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "ConversationData",
    "DataOrder",
    "Record",
    "Sample",
    "parse_record",
]

logger = logging.getLogger(__name__)

OnBadRecord = Literal["stop", "skip"]

IGNORED_LABEL = -100
_ROLES = ("human", "gpt")
_FORM = '[{"id": ..., "image": ..., "conversations": [{"from": "human", "value": ...}, ...]}]'


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation of the file.

    Attributes:
        name: Where it is, for messages: `chats.json, record 3 (id '7')`; 0-based.
        image: Its image, or None.
        turns: (question, answer) pairs, without image placeholders.
        image_turn: The question that the image belongs to; None without one.
    """

    name: str
    image: Path | None
    turns: tuple[tuple[str, str], ...]
    image_turn: int | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation as the decoder reads it, image rows in place.

    Attributes:
        name: As in `Record`.
        input_ids: [rows] int64; -200 in each row of the image.
        labels: [rows] int64; the id itself in answers and their `</s>`, else -100.
        answer_start: First row of the last answer, which runs to the end.
        pixel_values: [3, image_size, image_size] float32, or None without an image.
    """

    name: str
    input_ids: np.ndarray
    labels: np.ndarray
    answer_start: int
    pixel_values: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples padded on the right.

    Attributes:
        names: [batch] names of the records.
        input_ids: [batch, rows] int64; -200 for image rows, 0 for padding.
        labels: [batch, rows] int64; -100 for padding.
        is_image: [batch, rows] bool.
        is_answer: [batch, rows] bool, true in the last answer of each sample.
        pixel_values: [num_images, 3, image_size, image_size] float32, in the order of the
            samples; None without any.
    """

    names: tuple[str, ...]
    input_ids: torch.Tensor
    labels: torch.Tensor
    is_image: torch.Tensor
    is_answer: torch.Tensor
    pixel_values: torch.Tensor | None

    @classmethod
    def from_samples(cls, samples: Sequence[Sample]) -> Batch:
        """Pad samples to the longest."""
        shape = len(samples), max(len(sample.input_ids) for sample in samples)
        input_ids = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED_LABEL, np.int64)
        is_answer = np.zeros(shape, bool)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            input_ids[row, :length] = sample.input_ids
            labels[row, :length] = sample.labels
            is_answer[row, sample.answer_start : length] = True
        pixels = [s.pixel_values for s in samples if s.pixel_values is not None]
        import torch  # evaluation reads the same records without it

        return cls(
            names=tuple(sample.name for sample in samples),
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            is_image=torch.from_numpy(input_ids == IMAGE_PLACEHOLDER_ID),
            is_answer=torch.from_numpy(is_answer),
            pixel_values=torch.from_numpy(np.stack(pixels)) if pixels else None,
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        pixels = self.pixel_values
        return Batch(
            names=self.names,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            is_image=self.is_image.to(device),
            is_answer=self.is_answer.to(device),
            pixel_values=None if pixels is None else pixels.to(device),
        )


class DataOrder:
    """An endless order of records, each epoch shuffled by itself.

    Attributes:
        position: Records drawn so far: all there is to store.
    """

    def __init__(self, num_records: int, seed: int, position: int = 0) -> None:
        self.position = position
        self._num_records = num_records
        self._seed = seed
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    def draw(self) -> int:
        """Return the index of the next record."""
        epoch, index = divmod(self.position, self._num_records)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(self._num_records)
        self.position += 1
        return int(self._order[index])


class ConversationData:
    """The usable records of a file. Made by `read`.

    Attributes:
        records: Those that passed the checks.
        skipped: Why each of the others did not, one message per record.
        digest: SHA-256 of the file.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        tokenizer: ChatTokenizer,
        image_processor: ImageProcessor,
        num_image_tokens: int,
        max_length: int,
        vocab_size: int,
        on_bad_record: OnBadRecord,
    ) -> None:
        self.records = list(records)
        self.skipped: list[str] = []
        self.digest = ""
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._num_image_tokens = num_image_tokens
        self._max_length = max_length
        self._vocab_size = vocab_size
        self._on_bad_record = on_bad_record

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        image_folder: Path | None,
        allow_outside: bool = False,
        needs_image: bool,
        tokenizer: ChatTokenizer,
        image_processor: ImageProcessor,
        num_image_tokens: int,
        max_length: int,
        vocab_size: int,
        on_bad_record: OnBadRecord = "stop",
        progress: bool = False,
    ) -> ConversationData:
        """Read a file and check its records.

        Args:
            path: The JSON file.
            image_folder: What names of images start from; the file's folder by default.
            allow_outside: Take images outside that folder.
            needs_image: Refuse records without an image.
            tokenizer: The checkpoint's.
            image_processor: The checkpoint's.
            num_image_tokens: Rows of an image.
            max_length: Rows that a record may have.
            vocab_size: Rows of the token embedding.
            on_bad_record: `stop` at the first bad record, or `skip` them.
            progress: Show a progress bar on stderr.

        Raises:
            TrainingError: If the file is no such list, or no record is usable.
            BadRecordError: If a record is bad and `on_bad_record` is `stop`.
        """
        from tqdm import tqdm

        content = _read_file(path)
        folder = path.parent if image_folder is None else image_folder
        data = cls(
            (),
            tokenizer=tokenizer,
            image_processor=image_processor,
            num_image_tokens=num_image_tokens,
            max_length=max_length,
            vocab_size=vocab_size,
            on_bad_record=on_bad_record,
        )
        data.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entries: Iterable[Any] = tqdm(content, "checking records", disable=not progress)
        for number, entry in enumerate(entries):
            try:
                place = f"{path.name}, record {number}"
                record = parse_record(entry, place, folder, needs_image, allow_outside)
                data._encode(record)
            except BadRecordError as error:
                data._skip(error)
            else:
                data.records.append(record)
        if not data.records:
            reason = f", the first: {data.skipped[0]}" if data.skipped else ""
            raise TrainingError(
                f"{path} has {len(content)} records, expected at least one that can be used"
                f"{reason}."
            )
        return data

    def samples(self, order: DataOrder) -> Iterator[Sample]:
        """Yield samples without end; records whose image cannot be decoded are skipped.

        Raises:
            BadRecordError: If an image cannot be decoded and bad records stop the run.
            TrainingError: If that is so for every record.
        """
        num_failures = 0
        while num_failures < len(self.records):
            record = self.records[order.draw()]
            try:
                sample = self.sample(record)
            except BadRecordError as error:
                num_failures += 1
                self._skip(error)
            else:
                num_failures = 0
                yield sample
        raise TrainingError(
            f"None of {num_failures} images can be decoded, the last: {self.skipped[-1]}"
        )

    def sample(self, record: Record) -> Sample:
        """Return a record as the decoder reads it.

        Raises:
            BadRecordError: If its image cannot be decoded.
        """
        ids, is_answer = self._encode(record)
        pixel_values = None
        if record.image is not None:
            try:
                pixel_values = self._image_processor([record.image])[0]
            except InvalidInputError as error:
                raise BadRecordError(f"{record.name}: {error}") from error
        labels = np.where(is_answer, ids, IGNORED_LABEL)
        start = int(np.flatnonzero(~is_answer)[-1]) + 1
        return Sample(record.name, ids, labels, start, pixel_values)

    def _encode(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [rows] int64 with -200 in each image row, and where answers stand."""
        ids, is_answer = self._tokenizer.encode_answered(
            record.turns, image_turn=record.image_turn
        )
        repeats = np.where(ids == IMAGE_PLACEHOLDER_ID, self._num_image_tokens, 1)
        ids, is_answer = ids.repeat(repeats), is_answer.repeat(repeats)
        if len(ids) > self._max_length:
            image = f" ({self._num_image_tokens} of them image tokens)" if record.image else ""
            raise BadRecordError(
                f"{record.name} has {len(ids)} tokens{image}, the last answer ends beyond the "
                f"{self._max_length} that fit. Shorten it, or use --on-bad-record skip."
            )
        if not is_answer[-1]:
            raise BadRecordError(
                f"{record.name} ends with a token that is not part of its answer, expected the "
                "answer and </s>. Use the tokenizer that belongs to the checkpoint."
            )
        if ids.max() >= self._vocab_size:
            raise BadRecordError(
                f"{record.name} has the token id {ids.max()}, expected 0 to "
                f"{self._vocab_size - 1}. Use the tokenizer that belongs to the checkpoint."
            )
        return ids, is_answer

    def _skip(self, error: BadRecordError) -> None:
        if self._on_bad_record == "stop":
            raise error
        logger.warning("skipped: %s", error)
        if str(error) not in self.skipped:  # an image that fails again in the next epoch
            self.skipped.append(str(error))


def _read_file(path: Path) -> list[Any]:
    try:
        content = parse_json(read_data_file(path))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read as JSON ({error}), expected {_FORM}. Restore the file."
        ) from error
    if not isinstance(content, list):
        raise TrainingError(
            f"{path} holds a JSON {type(content).__name__}, expected a list: {_FORM}."
        )
    return content


def parse_record(
    entry: Any,
    place: str,
    image_folder: Path,
    needs_image: bool,
    allow_outside: bool = False,
) -> Record:
    """Check one conversation of LLaVA's JSON and return it as a record.

    Args:
        entry: The decoded JSON value.
        place: File and number, for messages.
        image_folder: What the name of its image starts from.
        needs_image: Refuse a conversation without an image.
        allow_outside: Take an image outside `image_folder`.

    Raises:
        BadRecordError: If it cannot be used.
    """
    if not isinstance(entry, dict):
        raise BadRecordError(
            f"{place} is a JSON {type(entry).__name__}, expected an object with id, image and "
            "conversations. Correct it, or use --on-bad-record skip."
        )
    name = f"{place} (id {entry['id']!r})" if "id" in entry else place
    turns, image_turn = _parse_turns(entry.get("conversations"), name)
    image = entry.get("image")
    if image is None and image_turn is None:
        if needs_image:
            raise BadRecordError(
                f"{name} has no image, and the image predictor needs one. Leave it out, or use "
                "--on-bad-record skip."
            )
        return Record(name, None, turns, None)
    if image is None or image_turn is None:
        found = f"an image but no {IMAGE_PLACEHOLDER}"
        if image is None:
            found = f"{IMAGE_PLACEHOLDER} but no image"
        raise BadRecordError(
            f"{name} has {found}, expected both or neither. Correct it, or use "
            "--on-bad-record skip."
        )
    if not isinstance(image, str) or not image:
        raise BadRecordError(
            f"{name} has the image {image!r}, expected the name of one file. Correct it, or use "
            "--on-bad-record skip."
        )
    try:
        file = image_file(image_folder, image, allow_outside=allow_outside)
    except OutsideError as error:
        raise BadRecordError(f"{name}: {error}, or --on-bad-record skip.") from error
    if file is None:
        raise BadRecordError(
            f"{name}: the image {image_folder / image} does not exist. Name its folder with "
            "--image-folder, or use --on-bad-record skip."
        )
    return Record(name, file, turns, image_turn)


def _parse_turns(
    conversations: Any, name: str
) -> tuple[tuple[tuple[str, str], ...], int | None]:
    """Return (question, answer) pairs, and which question the image belongs to."""
    remedy = "Correct it, or use --on-bad-record skip."
    if not isinstance(conversations, list) or not conversations:
        raise BadRecordError(
            f"{name} has conversations {shortened(conversations)!r}, expected a list of turns. "
            f"{remedy}"
        )
    texts: list[str] = []
    image_turns: list[int] = []
    for number, turn in enumerate(conversations):
        role = _ROLES[number % 2]
        text = turn.get("value") if isinstance(turn, dict) else None
        text = answer_text(text) if role == "gpt" else text
        if not isinstance(text, str) or turn.get("from") != role:
            found = turn.get("from") if isinstance(turn, dict) else turn
            raise BadRecordError(
                f"{name}: turn {number} is from {found!r}, expected text from {role!r}, since "
                f"human and gpt take turns. {remedy}"
            )
        num_places = text.count(IMAGE_PLACEHOLDER)
        if num_places and role == "gpt":
            raise BadRecordError(
                f"{name}: turn {number}, an answer, contains {IMAGE_PLACEHOLDER}. {remedy}"
            )
        if num_places:
            image_turns += [number // 2] * num_places
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        if role == "gpt" and not text.strip():
            raise BadRecordError(
                f"{name}: turn {number} is an empty answer, expected text. {remedy}"
            )
        texts.append(text)
    if len(texts) % 2:
        raise BadRecordError(
            f"{name} ends with a question, expected an answer from 'gpt' last. {remedy}"
        )
    if len(image_turns) > 1:
        raise BadRecordError(
            f"{name} has {len(image_turns)} times {IMAGE_PLACEHOLDER}, expected it once. "
            f"{remedy}"
        )
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    return turns, image_turns[0] if image_turns else None
