"""Ask bundles questions about images and compare their answers with the truth."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export.backends.registry import DEFAULT_BACKEND
from dllava_export.bundles.manifest import Manifest, read_manifest
from dllava_export.errors import InvalidInputError
from dllava_export.evaluation.metrics.metric import Metric
from dllava_export.evaluation.metrics.table import metric_by_name, suitable_metric
from dllava_export.evaluation.questions import (
    REMEDY,
    EvaluationError,
    Question,
    read_questions,
    skip_or_raise,
)
from dllava_export.evaluation.report import Answer, BundleResult, EvaluationReport, KVUse
from dllava_export.evaluation.settings import EvaluationSettings
from dllava_export.evaluation.sweep import Variant, check_sweep, sweep_variants
from dllava_export.prompts.bundle_files import open_image_processor, open_tokenizer
from dllava_export.prompts.image_sources import read_image
from dllava_export.prompts.images import ImageProcessor
from dllava_export.prompts.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from dllava_export.runtime.results import Generation
    from dllava_export.runtime.session import Session


__all__ = ["evaluate_bundles"]

logger = logging.getLogger(__name__)


_SPARE_TOKENS = 16  # a model may spell the truth with more tokens than its tokenizer would


def evaluate_bundles(
    folders: Sequence[str | Path],
    data: str | Path,
    settings: EvaluationSettings | None = None,
    *,
    image_folder: str | Path | None = None,
    answers: str | Path | None = None,
    backend: str = DEFAULT_BACKEND,
    progress: bool = False,
    **options: Any,
) -> EvaluationReport:
    """Ask bundles the same questions, one bundle after the other, greedily.

    Every question is checked against every bundle first, so that all answer the same ones. In
    a sweep, a bundle stands for those that are made from it.

    Args:
        folders: The bundles.
        data: The file with the questions.
        settings: How they are asked.
        image_folder: What names of images start from; the file's folder by default.
        answers: A file with the answers, by `question_id`; by default they stand in `data`.
        backend: As `load` takes it.
        progress: Show a progress bar on stderr.
        **options: The backend's own, as `load` takes them.

    Raises:
        EvaluationError: If the file or a record of it cannot be used, or a bundle has no
            tokenizer or no vision tower.
        BundleError: If a folder is no bundle.
        BackendError: If the backend cannot run one.
    """
    from tqdm import tqdm

    from dllava_export.runtime.loading import load

    settings = settings or EvaluationSettings()
    data = Path(data)
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise EvaluationError("There is no bundle to evaluate; expected at least one.")
    readers = [_Reader.open(path) for path in paths]
    entrants = [
        Variant(name, reader.path, reader.path, reader.manifest)
        for reader, name in zip(readers, _names(paths), strict=True)
    ]
    if settings.image_keep_tokens:
        check_sweep(entrants, settings, backend)
    skipped: list[str] = []
    questions = list(
        itertools.islice(
            _usable_questions(
                data, image_folder, answers, readers, settings, skipped, progress
            ),
            settings.limit,
        )
    )
    if not questions:
        reason = f", the first bad one: {skipped[0]}" if skipped else ""
        raise EvaluationError(
            f"{data} has no question that can be asked, expected at least one{reason}."
        )
    if settings.image_keep_tokens and all(question.image is None for question in questions):
        raise EvaluationError(
            f"{data} has no question about an image, expected one where numbers of image tokens "
            "are compared. Evaluate without --image-keep-tokens."
        )
    settings = _with_max_new_tokens(settings, readers, questions)
    metric = suitable_metric(q.expected for q in questions)
    if settings.metric is not None:
        metric = metric_by_name(settings.metric)
    settings = dataclasses.replace(settings, metric=metric.name)
    results = []
    with contextlib.ExitStack() as stack:
        if settings.image_keep_tokens:
            entrants = stack.enter_context(
                sweep_variants(entrants, settings, progress=progress)
            )
        total = len(entrants) * len(questions)
        bar = stack.enter_context(tqdm(total=total, disable=not progress, leave=False))
        for entrant in entrants:
            bar.set_description(entrant.name)
            opener = functools.partial(load, entrant.folder, backend, verify=False, **options)
            results.append(_ask_all(entrant, questions, settings, opener, bar.update))
    return EvaluationReport(data, settings, tuple(results), tuple(skipped))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """What reads a bundle's prompts; its graphs are opened later, one bundle at a time."""

    path: Path
    manifest: Manifest
    tokenizer: ChatTokenizer
    image_processor: ImageProcessor | None

    @classmethod
    def open(cls, path: Path) -> _Reader:
        manifest = read_manifest(path)
        if manifest.chat_template is None:
            raise EvaluationError(
                f"{path} has no tokenizer, and questions and answers are text. Export it from a "
                "checkpoint with a tokenizer."
            )
        tokenizer = open_tokenizer(path, manifest)
        processor = open_image_processor(path, manifest) if manifest.has_visual else None
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
        """Return the tokens of the longest truth, the end of the answer included."""
        return max(len(self.tokenizer.encode(text)) for text in {*question.answers}) + 1


def _usable_questions(
    data: Path,
    image_folder: str | Path | None,
    answers: str | Path | None,
    readers: Sequence[_Reader],
    settings: EvaluationSettings,
    skipped: list[str],
    progress: bool,
) -> Iterator[Question]:
    """Yield questions that every bundle can be asked; `skipped` gets why others are not."""
    from tqdm import tqdm

    metric = None if settings.metric is None else metric_by_name(settings.metric)
    is_strict = settings.on_bad_record == "stop"
    processors = {r.image_processor for r in readers if r.image_processor is not None}
    decoded: set[Path] = set()
    folder = None if image_folder is None else Path(image_folder)
    found = read_questions(
        data,
        folder,
        answers=None if answers is None else Path(answers),
        allow_outside=settings.allow_outside,
        skipped=None if is_strict else skipped,
    )
    for question in tqdm(found, "checking questions", disable=not progress, leave=False):
        try:
            if metric is not None:
                _check_truth(question, metric)
            for reader in readers:
                reader.check(question)
            if question.image is not None and question.image not in decoded:
                _check_image(question, processors)
                decoded.add(question.image)
        except EvaluationError as error:
            skip_or_raise(error, None if is_strict else skipped)
        else:
            yield question


def _check_truth(question: Question, metric: Metric) -> None:
    problem = metric.problem(question.expected)
    if problem is not None:
        raise EvaluationError(
            f"{question.name} {problem}. Choose another --metric, or use --on-bad-record skip."
        )


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
    entrant: Variant,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    open_session: Callable[[], Session],
    on_answers: Callable[[int], object],
) -> BundleResult:
    """Open a bundle and ask all questions; it is closed again when this returns."""
    session = open_session()
    # A batch runs until its longest answer ends, so answers of like length go together.
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].truth))
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    for first in range(0, len(questions), settings.batch_size):
        batch = order[first : first + settings.batch_size]
        found = _ask(session, [questions[index] for index in batch], settings)
        answers.update(zip(batch, found, strict=True))
        on_answers(len(batch))
    seconds = (time.perf_counter() - start) / len(questions)
    policy = entrant.manifest.sparsity.policy_text
    in_order = tuple(answers[index] for index in range(len(questions)))
    return BundleResult(entrant.name, entrant.source, policy, in_order, seconds)


def _ask(
    session: Session, questions: Sequence[Question], settings: EvaluationSettings
) -> list[Answer]:
    assert settings.max_new_tokens is not None
    assert settings.metric is not None
    metric = metric_by_name(settings.metric)
    generations = session.generate(
        [question.text for question in questions],
        [question.image for question in questions],
        max_new_tokens=settings.max_new_tokens,
        mode=settings.mode,
    )
    uses: Sequence[KVUse | None] = [None] * len(questions)
    if settings.mode == "cache":
        uses = _kv_uses(session)
    return [
        _answer(question, generation, use, metric)
        for question, generation, use in zip(questions, generations, uses, strict=True)
    ]


def _kv_uses(session: Session) -> list[KVUse]:
    """Return the valid bytes of each sample's caches. The first layer stores every row."""
    plan, lengths = session.kv_plan, session.cache_lengths
    pruned = slice(plan.groups[0].num_layers, None)
    return [
        KVUse(
            bytes=int(rows.sum()) * plan.bytes_per_row,
            dense_bytes=int(rows[0]) * len(rows) * plan.bytes_per_row,
            sparse_bytes=int(rows[pruned].sum()) * plan.bytes_per_row,
            dense_sparse_bytes=int(rows[0]) * len(rows[pruned]) * plan.bytes_per_row,
        )
        for rows in lengths.T
    ]


def _answer(
    question: Question, generation: Generation, use: KVUse | None, metric: Metric
) -> Answer:
    return Answer(
        question=question,
        text=generation.text,
        score=metric.score(generation.text, question.expected),
        num_tokens=len(generation.token_ids),
        num_kept_image_tokens=generation.num_kept_image_tokens,
        num_fed_tokens=generation.num_fed_tokens,
        num_kept_tokens=generation.num_kept_tokens,
        kv=use,
    )
