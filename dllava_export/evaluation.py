"""Ask bundles questions about images and compare their answers with the truth.

An answer is right if it is the truth, letter case and white space aside.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dllava_export import bundle
from dllava_export.chat import ChatTokenizer
from dllava_export.errors import InvalidInputError
from dllava_export.generation import MODES
from dllava_export.images import ImageProcessor, read_image
from dllava_export.questions import (
    REMEDY,
    TOTAL,
    EvaluationError,
    Question,
    read_questions,
    skip_or_raise,
)

if TYPE_CHECKING:
    from dllava_export.generation import Generation
    from dllava_export.session import Session

__all__ = [
    "Answer",
    "BundleResult",
    "EvaluationReport",
    "EvaluationSettings",
    "KVUse",
    "Summary",
    "evaluate",
    "normalised",
    "write_text",
]

logger = logging.getLogger(__name__)

OnBadRecord = Literal["stop", "skip"]

_SPARE_TOKENS = 16  # a model may spell the truth with more tokens than its tokenizer would


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How bundles are asked.

    Attributes:
        batch_size: Questions answered at once.
        max_new_tokens: Tokens of an answer at most; None for 16 more than the longest truth.
        mode: `cache`, or `recompute` for a pass without KV cache per token.
        limit: Ask only the first so many usable questions; None for all.
        on_bad_record: `stop` at the first bad record, or `skip` them.
        num_threads: Threads of the runtime; its own default where None.
    """

    batch_size: int = 8
    max_new_tokens: int | None = None
    mode: str = "cache"
    limit: int | None = None
    on_bad_record: OnBadRecord = "stop"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.on_bad_record not in ("stop", "skip"):
            raise ValueError(
                f"on_bad_record must be stop or skip, got {self.on_bad_record!r}."
            )


@dataclasses.dataclass(frozen=True)
class KVUse:
    """Bytes of valid KV cache rows of one sample when its answer is complete.

    Attributes:
        bytes: In all layers.
        dense_bytes: In all layers of a dense decoder that was fed the same.
        sparse_bytes: In the layers from `sparse_layer` on; 0 in a dense decoder.
        dense_sparse_bytes: In the same layers of a dense decoder.
    """

    bytes: int
    dense_bytes: int
    sparse_bytes: int
    dense_sparse_bytes: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """A bundle's answer to one question.

    Attributes:
        question: What was asked.
        text: The answer.
        num_tokens: Generated tokens.
        num_kept_image_tokens: Image tokens that go on from `sparse_layer`; 0 without an image.
        num_fed_tokens: Generated tokens that were fed back.
        num_kept_tokens: Of those, how many stay in the sparse caches.
        kv: KV cache at the end; None in mode `recompute`.
    """

    question: Question
    text: str
    num_tokens: int
    num_kept_image_tokens: int
    num_fed_tokens: int
    num_kept_tokens: int
    kv: KVUse | None

    @property
    def is_correct(self) -> bool:
        """True where the answer is the truth, letter case and white space aside."""
        return normalised(self.text) == normalised(self.question.truth)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What several answers of one bundle come to; None where there is nothing to count.

    Attributes:
        num_questions: Questions asked.
        num_correct: Right answers.
        kept_image_tokens: Mean over questions with an image.
        output_text_keep_rate: Share of all tokens fed back whose keys and values stay.
        kv_bytes: Mean bytes of KV cache at the end of an answer.
        kv_share: Of all those bytes, as a share of a dense decoder's.
        sparse_kv_share: The same, from `sparse_layer` on.
    """

    num_questions: int
    num_correct: int
    kept_image_tokens: float | None
    output_text_keep_rate: float | None
    kv_bytes: float | None
    kv_share: float | None
    sparse_kv_share: float | None

    @classmethod
    def from_answers(cls, answers: Sequence[Answer]) -> Summary:
        """Count answers."""
        images = [a.num_kept_image_tokens for a in answers if a.question.image is not None]
        uses = [a.kv for a in answers if a.kv is not None]
        num_bytes = sum(use.bytes for use in uses)
        return cls(
            num_questions=len(answers),
            num_correct=sum(answer.is_correct for answer in answers),
            kept_image_tokens=_ratio(sum(images), len(images)),
            output_text_keep_rate=_ratio(
                sum(a.num_kept_tokens for a in answers), sum(a.num_fed_tokens for a in answers)
            ),
            kv_bytes=_ratio(num_bytes, len(uses)),
            kv_share=_ratio(num_bytes, sum(use.dense_bytes for use in uses)),
            sparse_kv_share=_ratio(
                sum(use.sparse_bytes for use in uses),
                sum(use.dense_sparse_bytes for use in uses),
            ),
        )

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_correct / self.num_questions


@dataclasses.dataclass(frozen=True)
class BundleResult:
    """What one bundle answered.

    Attributes:
        name: Its folder's name, or its path where two bundles have the same.
        path: Its folder.
        policy: Its policy; `none` for a dense decoder.
        answers: One for each question, in their order.
        seconds_per_question: Time of everything, from image file to text.
    """

    name: str
    path: Path
    policy: str
    answers: tuple[Answer, ...]
    seconds_per_question: float

    @property
    def summaries(self) -> dict[str, Summary]:
        """By question type in the order of the file, `total` last."""
        groups: dict[str, list[Answer]] = {}
        for answer in self.answers:
            groups.setdefault(answer.question.type, []).append(answer)
        by_type = {name: Summary.from_answers(group) for name, group in groups.items()}
        return {**by_type, TOTAL: self.total}

    @property
    def total(self) -> Summary:
        """All answers together."""
        return Summary.from_answers(self.answers)


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Bundles side by side.

    Attributes:
        data: The file with the questions.
        settings: How bundles were asked; `max_new_tokens` is a number.
        results: One for each bundle, in the order in which they were given.
        skipped: Why each record that was left out cannot be used.
    """

    data: Path
    settings: EvaluationSettings
    results: tuple[BundleResult, ...]
    skipped: tuple[str, ...]

    def gain_over_random(self, result: BundleResult) -> float | None:
        """Return accuracy above that of policy `random`, in points; None without one.

        Among several random bundles, one that keeps as many image tokens counts.
        """
        randoms = [other for other in self.results if other.policy == "random"]
        if not randoms or result.policy == "random":
            return None
        kept = result.total.kept_image_tokens
        alike = [other for other in randoms if other.total.kept_image_tokens == kept]
        return 100 * (result.total.accuracy - (alike or randoms)[0].total.accuracy)

    def to_json(self) -> dict[str, Any]:
        """Return everything, each answer too, ready for JSON."""
        return {
            "data": str(self.data),
            "settings": dataclasses.asdict(self.settings),
            "num_questions": len(self.results[0].answers),
            "skipped": list(self.skipped),
            "bundles": [self._result_json(result) for result in self.results],
        }

    def to_text(self) -> str:
        """Return the tables as plain text."""
        lines = [self._heading()]
        for title, rows in self._tables():
            lines += ["", title, *_plain_table(rows)]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        lines = [self._heading()]
        for title, rows in self._tables():
            lines += ["", f"**{title}**", "", *_markdown_table(rows)]
        return "\n".join(lines) + "\n"

    def _result_json(self, result: BundleResult) -> dict[str, Any]:
        def summary(values: Summary) -> dict[str, Any]:
            return {"accuracy": values.accuracy, **dataclasses.asdict(values)}

        def answer(values: Answer) -> dict[str, Any]:
            fields = dataclasses.asdict(values)
            question = fields.pop("question")
            if question["image"] is not None:
                question["image"] = str(question["image"])
            return {**question, "answer": fields.pop("text"), "is_correct": values.is_correct,
                    **fields}  # fmt: skip

        return {
            "name": result.name,
            "path": str(result.path),
            "policy": result.policy,
            "seconds_per_question": result.seconds_per_question,
            "gain_over_random": self.gain_over_random(result),
            "summaries": {name: summary(s) for name, s in result.summaries.items()},
            "answers": [answer(values) for values in result.answers],
        }

    def _heading(self) -> str:
        settings = self.settings
        mode = "with KV cache" if settings.mode == "cache" else "without KV cache"
        count = _counted(len(self.results[0].answers), "question")
        text = (
            f"{count} of {self.data.name}, greedy, {mode}, batch {settings.batch_size}, at most "
            f"{settings.max_new_tokens} new tokens"
        )
        if self.skipped:
            text += f"; {_counted(len(self.skipped), 'record')} skipped"
        return text

    def _tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        yield "Accuracy", self._accuracy_table()
        yield "Cost", self._cost_table()
        if len(self.results[0].summaries) > 2:
            yield (
                "Output text kept, by question type",
                self._table_by_type("output_text_keep_rate"),
            )
        if self.settings.mode == "cache" and len(self.results[0].summaries) > 2:
            title = "KV from the sparse layer on, share of dense, by question type"
            yield title, self._table_by_type("sparse_kv_share")

    def _accuracy_table(self) -> list[list[str]]:
        summaries = self.results[0].summaries
        header = ["", *(f"{name} ({s.num_questions})" for name, s in summaries.items())]
        rows = [
            [result.name, *(_percent(s.accuracy) for s in result.summaries.values())]
            for result in self.results
        ]
        if any(result.policy == "random" for result in self.results):
            header.append("gain over random")
            for row, result in zip(rows, self.results, strict=True):
                gain = self.gain_over_random(result)
                row.append("-" if gain is None else f"{gain:+.1f} points")
        return [header, *rows]

    def _cost_table(self) -> list[list[str]]:
        rows = [["", "policy", "image tokens kept", "output text kept", "s/question"]]
        if has_cache := self.settings.mode == "cache":
            rows[0][-1:-1] = ["KV at the end", "of dense", "from sparse layer on"]
        for result in self.results:
            total = result.total
            row = [
                result.name,
                result.policy,
                "-" if total.kept_image_tokens is None else f"{total.kept_image_tokens:.1f}",
                _percent(total.output_text_keep_rate),
            ]
            if has_cache:
                row += [
                    "-" if total.kv_bytes is None else f"{total.kv_bytes / 1024:,.1f} KiB",
                    _percent(total.kv_share),
                    _percent(total.sparse_kv_share),
                ]
            rows.append([*row, f"{result.seconds_per_question:.3f}"])
        return rows

    def _table_by_type(self, field: str) -> list[list[str]]:
        return [
            ["", *self.results[0].summaries],
            *(
                [
                    result.name,
                    *(_percent(getattr(s, field)) for s in result.summaries.values()),
                ]
                for result in self.results
            ),
        ]


def normalised(text: str) -> str:
    """Return a text with single spaces and without letter case."""
    return " ".join(text.split()).casefold()


def evaluate(
    folders: Sequence[str | Path],
    data: str | Path,
    settings: EvaluationSettings | None = None,
    *,
    image_folder: str | Path | None = None,
    backend: str = "onnxruntime",
    progress: bool = False,
) -> EvaluationReport:
    """Ask bundles the same questions, one bundle after the other, greedily.

    Every question is checked against every bundle first, so that all answer the same ones.

    Args:
        folders: The bundles.
        data: The file with the questions.
        settings: How they are asked.
        image_folder: What names of images start from; the file's folder by default.
        backend: As `load` takes it.
        progress: Show a progress bar on stderr.

    Raises:
        EvaluationError: If the file or a record of it cannot be used, or a bundle has no
            tokenizer or no vision tower.
        BundleError: If a folder is no bundle.
        BackendError: If the backend cannot run one.
    """
    from tqdm import tqdm

    settings = settings or EvaluationSettings()
    data = Path(data)
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise EvaluationError("There is no bundle to evaluate; expected at least one.")
    readers = [_Reader.open(path) for path in paths]
    skipped: list[str] = []
    questions = list(
        itertools.islice(
            _usable_questions(data, image_folder, readers, settings, skipped, progress),
            settings.limit,
        )
    )
    if not questions:
        reason = f", the first bad one: {skipped[0]}" if skipped else ""
        raise EvaluationError(
            f"{data} has no question that can be asked, expected at least one{reason}."
        )
    settings = _with_max_new_tokens(settings, readers, questions)
    results = []
    with tqdm(total=len(paths) * len(questions), disable=not progress, leave=False) as bar:
        for reader, name in zip(readers, _names(paths), strict=True):
            bar.set_description(name)
            results.append(_ask_all(reader, name, questions, settings, backend, bar.update))
    return EvaluationReport(data, settings, tuple(results), tuple(skipped))


def write_text(path: Path, text: str) -> None:
    """Write a file that appears under its name only when it is complete.

    Raises:
        InvalidInputError: If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be written ({error.strerror}). Choose a file you may write."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """What reads a bundle's prompts; its graphs are opened later, one bundle at a time."""

    path: Path
    manifest: bundle.Manifest
    tokenizer: ChatTokenizer
    image_processor: ImageProcessor | None

    @classmethod
    def open(cls, path: Path) -> _Reader:
        manifest = bundle.read_manifest(path)
        if manifest.chat_template is None:
            raise EvaluationError(
                f"{path} has no tokenizer, and questions and answers are text. Export it from a "
                "checkpoint with a tokenizer."
            )
        tokenizer = ChatTokenizer.from_folder(
            path / bundle.LLM_FOLDER,
            template=manifest.chat_template,
            image_token_id=manifest.image_token_id,
        )
        processor = None
        if manifest.has_visual:
            config = path / bundle.VISUAL_FOLDER / "preprocessor_config.json"
            processor = ImageProcessor.from_config(
                json.loads(config.read_text(encoding="utf-8")), manifest.image_aspect_ratio
            )
        return cls(path, manifest, tokenizer, processor)

    def check(self, question: Question) -> None:
        """Raise `EvaluationError` where question and truth do not fit the bundle."""
        if question.image is not None and self.image_processor is None:
            raise EvaluationError(
                f"{question.name} has an image, and {self.path} has no vision tower. Export it "
                "from a LLaVA checkpoint."
            )
        try:
            text = self.tokenizer.render(question.text, with_image=question.image is not None)
        except InvalidInputError as error:
            raise EvaluationError(f"{question.name}: {error}") from error
        num_image = self.manifest.geometry.num_image_tokens - 1 if question.image else 0
        num_prompt = len(self.tokenizer.encode(text)) + num_image
        length = num_prompt + self.num_answer_tokens(question)
        longest = self.manifest.max_position_embeddings
        if length > longest:
            raise EvaluationError(
                f"{question.name} has {length} tokens with its answer, {num_prompt} without; "
                f"{self.path} takes {longest}. {REMEDY}"
            )

    def num_answer_tokens(self, question: Question) -> int:
        """Return the tokens of the truth, the end of the answer included."""
        return len(self.tokenizer.encode(question.truth)) + 1


def _usable_questions(
    data: Path,
    image_folder: str | Path | None,
    readers: Sequence[_Reader],
    settings: EvaluationSettings,
    skipped: list[str],
    progress: bool,
) -> Iterator[Question]:
    """Yield questions that every bundle can be asked; `skipped` gets why others are not."""
    from tqdm import tqdm

    is_strict = settings.on_bad_record == "stop"
    processors = {r.image_processor for r in readers if r.image_processor is not None}
    decoded: set[Path] = set()
    folder = None if image_folder is None else Path(image_folder)
    found = read_questions(data, folder, skipped=None if is_strict else skipped)
    for question in tqdm(found, "checking questions", disable=not progress, leave=False):
        try:
            for reader in readers:
                reader.check(question)
            if question.image is not None and question.image not in decoded:
                _check_image(question, processors)
                decoded.add(question.image)
        except EvaluationError as error:
            skip_or_raise(error, None if is_strict else skipped)
        else:
            yield question


def _check_image(question: Question, processors: set[ImageProcessor]) -> None:
    assert question.image is not None
    try:
        image = read_image(question.image)
        for processor in processors:
            processor([image])
    except InvalidInputError as error:
        raise EvaluationError(f"{question.name}: {error}") from error


def _with_max_new_tokens(
    settings: EvaluationSettings, readers: Sequence[_Reader], questions: Sequence[Question]
) -> EvaluationSettings:
    longest = max(
        reader.num_answer_tokens(question) for reader in readers for question in questions
    )
    if settings.max_new_tokens is None:
        return dataclasses.replace(settings, max_new_tokens=longest + _SPARE_TOKENS)
    if longest > settings.max_new_tokens:
        logger.warning(
            "the longest truth has %d tokens and answers at most %d: some cannot be right",
            longest,
            settings.max_new_tokens,
        )
    return settings


def _names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return [
        str(path) if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]


def _ask_all(
    reader: _Reader,
    name: str,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    backend: str,
    on_answers: Callable[[int], object],
) -> BundleResult:
    """Open a bundle and ask all questions; it is closed again when this returns."""
    from dllava_export.session import load

    session = load(reader.path, backend, num_threads=settings.num_threads, verify=False)
    answers: list[Answer] = []
    start = time.perf_counter()
    for first in range(0, len(questions), settings.batch_size):
        batch = questions[first : first + settings.batch_size]
        answers += _ask(session, batch, settings)
        on_answers(len(batch))
    seconds = (time.perf_counter() - start) / len(questions)
    policy = reader.manifest.sparsity.policy
    return BundleResult(name, reader.path, policy, tuple(answers), seconds)


def _ask(
    session: Session, questions: Sequence[Question], settings: EvaluationSettings
) -> list[Answer]:
    assert settings.max_new_tokens is not None
    generations = session.generate(
        [question.image for question in questions],
        [question.text for question in questions],
        max_new_tokens=settings.max_new_tokens,
        mode=settings.mode,
    )
    uses: Sequence[KVUse | None] = [None] * len(questions)
    if settings.mode == "cache":
        uses = _kv_uses(session)
    return [
        _answer(question, generation, use)
        for question, generation, use in zip(questions, generations, uses, strict=True)
    ]


def _kv_uses(session: Session) -> list[KVUse]:
    """Return the valid bytes of each sample's caches. The first layer stores every row."""
    plan, lengths = session.kv_plan, session.cache_lengths
    return [
        KVUse(
            bytes=int(rows.sum()) * plan.bytes_per_row,
            dense_bytes=int(rows[0]) * len(rows) * plan.bytes_per_row,
            sparse_bytes=int(rows[plan.num_full_layers :].sum()) * plan.bytes_per_row,
            dense_sparse_bytes=int(rows[0]) * plan.num_sparse_layers * plan.bytes_per_row,
        )
        for rows in lengths.T
    ]


def _answer(question: Question, generation: Generation, use: KVUse | None) -> Answer:
    return Answer(
        question=question,
        text=generation.text,
        num_tokens=len(generation.token_ids),
        num_kept_image_tokens=generation.num_kept_image_tokens,
        num_fed_tokens=generation.num_fed_tokens,
        num_kept_tokens=generation.num_kept_tokens,
        kv=use,
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return [f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:])]
