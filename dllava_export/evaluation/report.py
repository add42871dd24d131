"""What an evaluation found: answers, what they come to by question type, tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dllava_export.evaluation.metrics.metric import Detail
from dllava_export.evaluation.metrics.table import metric_by_name
from dllava_export.evaluation.proportions import Proportion, difference_interval
from dllava_export.evaluation.questions import TOTAL, Question
from dllava_export.reporting.tables import aligned_lines

if TYPE_CHECKING:
    from dllava_export.evaluation.settings import EvaluationSettings


__all__ = [
    "Answer",
    "BundleResult",
    "EvaluationReport",
    "KVUse",
    "Summary",
    "WhichAnswers",
]

WhichAnswers = Literal["all", "wrong"]

_BASELINE = "random"  # what a policy must beat: the JSON and the tables name it too


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
        score: How right it is by the metric: 0 wrong, 1 right.
        num_tokens: Generated tokens.
        num_kept_image_tokens: Image tokens that go on from `sparse_layer`; 0 without an image.
        num_fed_tokens: Generated tokens that were fed back.
        num_kept_tokens: Of those, how many stay in the sparse caches.
        kv: KV cache at the end; None in mode `recompute`.
    """

    question: Question
    text: str
    score: float
    num_tokens: int
    num_kept_image_tokens: int
    num_fed_tokens: int
    num_kept_tokens: int
    kv: KVUse | None

    @property
    def is_correct(self) -> bool:
        """True where the answer is wholly right."""
        return self.score == 1


@dataclasses.dataclass(frozen=True)
class Summary:
    """What several answers of one bundle come to; None where there is nothing to count.

    Attributes:
        num_questions: Questions asked.
        num_correct: Right answers; partly right ones by their score.
        kept_image_tokens: Mean over questions with an image.
        output_text_keep_rate: Share of all tokens fed back whose keys and values stay.
        kv_bytes: Mean bytes of KV cache at the end of an answer.
        kv_share: Of all those bytes, as a share of a dense decoder's.
        sparse_kv_share: The same, from `sparse_layer` on.
    """

    num_questions: int
    num_correct: float
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
            num_correct=math.fsum(answer.score for answer in answers),
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

    @property
    def right(self) -> Proportion:
        """Right answers of all, with its confidence interval."""
        return Proportion(self.num_correct, self.num_questions)


@dataclasses.dataclass(frozen=True)
class BundleResult:
    """What one bundle answered.

    Attributes:
        name: Its folder's name, or its path where two bundles have the same.
        path: Its folder; in a sweep that of the bundle which it was made from.
        policy: What prunes, as `Sparsity.policy_text` has it; `none` for a dense decoder.
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
        return {name: Summary.from_answers(group) for name, group in self.by_type.items()}

    @property
    def by_type(self) -> dict[str, tuple[Answer, ...]]:
        """Answers by question type in the order of the file, all of them as `total` last."""
        groups: dict[str, list[Answer]] = {}
        for answer in self.answers:
            groups.setdefault(answer.question.type, []).append(answer)
        return {**{name: tuple(group) for name, group in groups.items()}, TOTAL: self.answers}

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

        Among several random bundles, one that keeps as many image tokens counts, first of all
        one made from the same bundle.
        """
        baseline = self._baseline_of(result)
        if baseline is None:
            return None
        return 100 * (result.total.accuracy - baseline.total.accuracy)

    def gain_interval(self, result: BundleResult) -> tuple[float, float] | None:
        """Return the 95 % interval of `gain_over_random`, in points; None without one."""
        baseline = self._baseline_of(result)
        if baseline is None:
            return None
        found = difference_interval(result.total.right, baseline.total.right)
        return None if found is None else (100 * found[0], 100 * found[1])

    def _baseline_of(self, result: BundleResult) -> BundleResult | None:
        randoms = [other for other in self.results if other.policy == _BASELINE]
        if not randoms or result.policy == _BASELINE:
            return None
        kept = result.total.kept_image_tokens
        alike = [other for other in randoms if other.total.kept_image_tokens == kept]
        if not alike:
            return randoms[0] if len(randoms) == 1 else None
        return next((other for other in alike if other.path == result.path), alike[0])

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
            lines += ["", title, *aligned_lines(rows)]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        lines = [self._heading()]
        for title, rows in self._tables():
            lines += ["", f"**{title}**", "", *_markdown_table(rows)]
        return "\n".join(lines) + "\n"

    def answers_text(self, which: WhichAnswers) -> str:
        """Return questions with their truth and each bundle's answer.

        Args:
            which: `all`, or `wrong` for questions that some bundle answered wrongly.
        """
        lines = []
        width = max(len("question"), *(len(result.name) for result in self.results))
        for answers in zip(*(result.answers for result in self.results), strict=True):
            if which == "wrong" and all(answer.is_correct for answer in answers):
                continue
            question = answers[0].question
            if question.image is not None:
                lines.append(f"{'image':<{width}}  {question.image}")
            lines.append(f"{'question':<{width}}  {question.text}")
            lines.append(f"{'truth':<{width}}  {question.truth}")
            for result, answer in zip(self.results, answers, strict=True):
                verdict = {0: "WRONG", 1: "right"}.get(answer.score, f"{answer.score:.2f}")
                lines.append(f"{result.name:<{width}}  {answer.text}  [{verdict}]")
            lines.append("")
        return "\n".join(lines)

    def _result_json(self, result: BundleResult) -> dict[str, Any]:
        def summary(values: Summary) -> dict[str, Any]:
            return {
                "accuracy": values.accuracy,
                "interval_95": values.right.interval,
                **dataclasses.asdict(values),
            }

        def answer(values: Answer) -> dict[str, Any]:
            fields = dataclasses.asdict(values)
            question = fields.pop("question")
            if question["image"] is not None:
                question["image"] = str(question["image"])
            return {**question, "truth": values.question.truth, "answer": fields.pop("text"),
                    "is_correct": values.is_correct, **fields}  # fmt: skip

        return {
            "name": result.name,
            "path": str(result.path),
            "policy": result.policy,
            "seconds_per_question": result.seconds_per_question,
            "gain_over_random": self.gain_over_random(result),
            "gain_interval_95": self.gain_interval(result),
            "details": {
                kind: {name: _detail_json(value) for name, value in found.items()}
                for kind, found in self._details(result).items()
            },
            "summaries": {name: summary(s) for name, s in result.summaries.items()},
            "answers": [answer(values) for values in result.answers],
        }

    def _heading(self) -> str:
        settings = self.settings
        mode = "with KV cache" if settings.mode == "cache" else "without KV cache"
        count = _counted(len(self.results[0].answers), "question")
        text = (
            f"{count} of {self.data.name}, metric {settings.metric}, greedy, {mode}, batch "
            f"{settings.batch_size}, at most {settings.max_new_tokens} new tokens"
        )
        if self.skipped:
            text += f"; {_counted(len(self.skipped), 'record')} skipped"
        return text

    def _tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        if self.settings.image_keep_tokens:
            yield "Sweep: right / asked, share, 95 % interval", self._sweep_table()
            yield from self._details_tables()
            return
        yield "Accuracy: right / asked, share, 95 % interval", self._accuracy_table()
        yield from self._details_tables()
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
        """Return a row for each question type: there are mostly fewer bundles than types."""
        rows = [["", *(result.name for result in self.results)]]
        for kind in self.results[0].summaries:
            cells = [_proportion(result.summaries[kind].right) for result in self.results]
            rows.append([kind, *cells])
        if any(result.policy == _BASELINE for result in self.results):
            rows.append(["gain over random", *map(self._gain_text, self.results)])
        return rows

    def _gain_text(self, result: BundleResult) -> str:
        gain, interval = self.gain_over_random(result), self.gain_interval(result)
        if gain is None or interval is None:
            return "-"
        return f"{gain:+.1f} points [{interval[0]:+.1f}, {interval[1]:+.1f}]"

    def _details(self, result: BundleResult) -> dict[str, dict[str, Detail]]:
        """Return what the metric has to say beyond accuracy, by question type."""
        assert self.settings.metric is not None
        metric = metric_by_name(self.settings.metric)
        return {
            kind: metric.details([(a.text, a.question.expected) for a in answers])
            for kind, answers in result.by_type.items()
        }

    def _sweep_table(self) -> list[list[str]]:
        """Return a row for each policy and number of tokens: accuracy beside what it costs."""
        has_cache = self.settings.mode == "cache"
        has_gain = any(result.policy == _BASELINE for result in self.results)
        rows = [["", "image tokens kept", "accuracy", "s/question"]]
        rows[0] += ["KV of dense"] if has_cache else []
        rows[0] += ["gain over random"] if has_gain else []
        for result in self.results:
            total = result.total
            row = [
                result.name,
                "-" if total.kept_image_tokens is None else f"{total.kept_image_tokens:.0f}",
                _proportion(total.right),
                f"{result.seconds_per_question:.3f}",
            ]
            row += [_percent(total.kv_share)] if has_cache else []
            rows.append([*row, self._gain_text(result)] if has_gain else row)
        return rows

    def _details_tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Yield a table with a row for each bundle and type, if the metric has more to say."""
        rows: list[list[str]] = []
        heading = [""]
        for result in self.results:
            for kind, found in self._details(result).items():
                if found:
                    heading = ["", *found]
                    rows.append([f"{result.name}, {kind}", *map(_detail_text, found.values())])
        if rows:
            yield f"Metric {self.settings.metric}", [heading, *rows]

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


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _proportion(found: Proportion) -> str:
    """Return `240/250  96.0 % [92.8, 97.8]`; partly right answers make a count of 240.33."""
    count = f"{found.count:.2f}".rstrip("0").rstrip(".")
    if found.interval is None:
        return f"{count}/{found.total}  -"
    low, high = (100 * end for end in found.interval)
    return f"{count}/{found.total}  {_percent(found.share)} [{low:.1f}, {high:.1f}]"


def _detail_text(value: Detail) -> str:
    return _proportion(value) if isinstance(value, Proportion) else _percent(value)


def _detail_json(value: Detail) -> Any:
    if not isinstance(value, Proportion):
        return value
    return {"share": value.share, "interval_95": value.interval, **dataclasses.asdict(value)}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return [f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:])]
