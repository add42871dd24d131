from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from places import CAT

from dllava_export import cli
from dllava_export.bundles import layout
from dllava_export.errors import BackendError, BundleError
from dllava_export.evaluation.evaluate import evaluate_bundles
from dllava_export.evaluation.metrics.exact import Exact
from dllava_export.evaluation.questions import EvaluationError, Question, read_questions
from dllava_export.evaluation.report import (
    Answer,
    BundleResult,
    EvaluationReport,
    KVUse,
    Summary,
)
from dllava_export.evaluation.settings import EvaluationSettings

ONE = EvaluationSettings()
PROMPTS = {"w5 w6": "short", "w7": "short", "w8 w9 w10": "long"}


def conversation(question: str = "<image>\nw5", answer: str = "w6", **keys: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "a", "image": "cat.png", "conversations": turns, **keys}


def line(**keys: object) -> dict:
    """A record of a question file; None takes a key away."""
    record = {"question_id": 7, "image": "cat.png", "text": "w5", "answer": "w6", **keys}
    return {key: value for key, value in record.items() if value is not None}


@pytest.fixture
def folder(tmp_path):
    """A folder with `cat.png`."""
    with Image.open(CAT) as image:
        image.convert("RGB").resize((40, 40)).save(tmp_path / "cat.png")
    return tmp_path


def write(folder: Path, *records: object) -> Path:
    path = folder / "questions.json"
    path.write_text(json.dumps(records))
    return path


def write_lines(folder: Path, *records: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Questions.


def test_conversations(folder):
    turns = [*conversation()["conversations"], {"from": "human", "value": "And?"}]
    path = write(
        folder, conversation(category="colours"), conversation("w7", image=None),
        conversation(conversations=turns, kind="sum"),
    )  # fmt: skip
    image = folder / "cat.png"
    assert list(read_questions(path)) == [
        Question("questions.json, record 0 (id 'a')", "colours", "w5", ("w6",), image),
        Question("questions.json, record 1 (id 'a')", "all", "w7", ("w6",), None),
        Question("questions.json, record 2 (id 'a')", "sum", "w5", ("w6",), image),
    ]


@pytest.mark.parametrize(
    ("writer", "places"),
    [(write, ("record 0", "record 1")), (write_lines, ("line 1", "line 2"))],
)
def test_question_files(folder, writer, places):
    path = writer(folder, line(question_type="yes/no"), line(image=None, text=" w5\n"))
    image = folder / "cat.png"
    assert list(read_questions(path)) == [
        Question(f"{path.name}, {places[0]} (id 7)", "yes/no", "w5", ("w6",), image),
        Question(f"{path.name}, {places[1]} (id 7)", "all", "w5", ("w6",), None),
    ]


def test_images_lie_in_a_folder_of_their_own(folder):
    (folder / "images").mkdir()
    (folder / "cat.png").rename(folder / "images" / "cat.png")
    (question,) = read_questions(write(folder, line()), folder / "images")
    assert question.image == folder / "images" / "cat.png"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param(conversation(image="dog.png"), r"questions\.json, record 1 \(id 'a'\): the "
                     r"image \S+dog\.png does not exist\. Name its folder", id="no image file"),
        pytest.param(conversation(answer=" "), r"record 1 \(id 'a'\): turn 1 is an empty answer",
                     id="empty answer"),
        pytest.param(conversation(conversations=[{"from": "human", "value": "<image>\nw5"}]),
                     "ends with a question, expected an answer", id="no answer in turns"),
        pytest.param(conversation("w5"), "has an image but no <image>", id="no placeholder"),
        pytest.param(conversation(conversations="w5"), "has conversations 'w5', expected a list",
                     id="turns are no list"),
        pytest.param(conversation(category=3), "has the question type 3, expected a text",
                     id="type is no text"),
        pytest.param(conversation(category="total"), "has the question type 'total', expected a "
                     "text other than 'total'", id="type is reserved"),
        pytest.param("w5", "record 1 is a JSON str, expected an object with conversations, or "
                     "with text and answer", id="no object"),
        pytest.param(line(answer=None), r"questions\.json, record 1 \(id 7\) has no 'answer', "
                     "expected the answer as text", id="no answer"),
        pytest.param(line(answer=""), "has the answer '', expected the answer as text",
                     id="blank answer"),
        pytest.param(line(answer=[True]), r"has the answer '\[True\]', expected the answer as "
                     "text, a number or a list of them", id="answer is no text"),
        pytest.param(line(answer=[]), r"has the answer '\[\]', expected the answer as text",
                     id="no answers"),
        pytest.param(line(text=None), "has no text or question, expected the question as text",
                     id="no question"),
    ],
)  # fmt: skip
def test_bad_records(folder, record, message):
    path = write(folder, conversation(), record, conversation())
    with pytest.raises(EvaluationError, match=message):
        list(read_questions(path))
    skipped: list[str] = []
    assert len(list(read_questions(path, skipped=skipped))) == 2
    assert len(skipped) == 1


def test_a_bad_line_is_one_bad_record(folder):
    path = write_lines(folder, line(), line())
    path.write_text(path.read_text() + '{"text": "w5\n' + json.dumps(line()))
    message = r"questions\.jsonl, line 3 cannot be read as JSON \(Unterminated string"
    with pytest.raises(EvaluationError, match=message):
        list(read_questions(path))
    skipped: list[str] = []
    assert len(list(read_questions(path, skipped=skipped))) == 3
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b'[{"id": 1}, ', r"questions\.json cannot be read as JSON \(.+\), expected "
                     "a list of records", id="truncated"),
        pytest.param(b"\xff\xfe", r"questions\.json cannot be read \(", id="no text"),
        pytest.param(None, r"questions\.json cannot be read \(.*No such file", id="missing"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "questions.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        list(read_questions(path))


# Counting.


def answer(text: str, truth: str = "a", question_type: str = "x", **values: object) -> Answer:
    question = Question("q", question_type, "?", (truth,), Path("cat.png"))
    counts = {"score": Exact().score(text, question.expected),
              "num_tokens": 3, "num_kept_image_tokens": 7, "num_fed_tokens": 2,
              "num_kept_tokens": 1, "kv": KVUse(30, 40, 10, 20)}  # fmt: skip
    return Answer(question, text, **{**counts, **values})


@pytest.mark.parametrize(
    ("text", "truth", "is_correct"),
    [
        ("A  Cat.\n", "a cat.", True),
        ("a cat", "a cat.", False),
        ("STRASSE", "straße", True),
        ("", "a", False),
    ],
)
def test_answers_are_compared_without_case_and_space(text, truth, is_correct):
    assert answer(text, truth).is_correct is is_correct


def test_summary():
    longer = answer("b", num_fed_tokens=6, num_kept_tokens=1, num_kept_image_tokens=9,
                    kv=KVUse(50, 120, 10, 80))  # fmt: skip
    summary = Summary.from_answers([answer("a"), longer])
    assert summary == Summary(2, 1, 8.0, 0.25, 40.0, 0.5, 0.2)
    assert summary.accuracy == 0.5


def test_summary_with_nothing_to_count():
    text_only = dataclasses.replace(answer("a").question, image=None)
    nothing = answer("a", num_fed_tokens=0, num_kept_tokens=0, kv=None)
    nothing = dataclasses.replace(nothing, question=text_only)
    assert Summary.from_answers([nothing]) == Summary(1, 1, None, None, None, None, None)


def test_summary_of_a_dense_decoder():
    summary = Summary.from_answers([answer("a", kv=KVUse(40, 40, 0, 0))])
    assert (summary.kv_share, summary.sparse_kv_share) == (1.0, None)


def report(*policies: str, mode: str = "cache", right: dict[str, str] | None = None):
    """A hand-made report; `right` says which of four questions a policy gets right."""
    right = right or {"predictor": "1110", "random": "1000", "none": "1111"}
    results = []
    for policy in policies:
        answers = tuple(
            answer("a" if bit == "1" else "b", question_type=kind,
                   **({"kv": None} if mode == "recompute" else {}))
            for bit, kind in zip(right[policy], ("x", "y", "x", "y"), strict=True)
        )  # fmt: skip
        results.append(BundleResult(f"b_{policy}", Path(policy), policy, answers, 0.125))
    settings = EvaluationSettings(mode=mode, max_new_tokens=9, metric="exact")
    return EvaluationReport(Path("in/q.json"), settings, tuple(results), ("bad",))


def test_report_as_text():
    assert report("predictor", "random").to_text() == (
        "4 questions of q.json, metric exact, greedy, with KV cache, batch 8, at most 9 new "
        "tokens; 1 record skipped\n"
        "\n"
        "Accuracy: right / asked, share, 95 % interval\n"
        + "\n".join(
            f"{name:<16}  {first:>27}  {second:>23}"
            for name, first, second in (
                ("", "b_predictor", "b_random"),
                ("x", "2/2  100.0 % [34.2, 100.0]", "1/2  50.0 % [9.5, 90.5]"),
                ("y", "1/2  50.0 % [9.5, 90.5]", "0/2  0.0 % [0.0, 65.8]"),
                ("total", "3/4  75.0 % [30.1, 95.4]", "1/4  25.0 % [4.6, 69.9]"),
                ("gain over random", "+50.0 points [-13.5, +78.9]", "-"),
            )
        )
        + "\n"
        "\n"
        "Cost\n"
        "                policy  image tokens kept  output text kept  KV at the end  of dense  "
        "from sparse layer on  s/question\n"
        "b_predictor  predictor                7.0            50.0 %        0.0 KiB    75.0 %  "
        "              50.0 %       0.125\n"
        "b_random        random                7.0            50.0 %        0.0 KiB    75.0 %  "
        "              50.0 %       0.125\n"
        "\n"
        "Output text kept, by question type\n"
        "                  x       y   total\n"
        "b_predictor  50.0 %  50.0 %  50.0 %\n"
        "b_random     50.0 %  50.0 %  50.0 %\n"
        "\n"
        "KV from the sparse layer on, share of dense, by question type\n"
        "                  x       y   total\n"
        "b_predictor  50.0 %  50.0 %  50.0 %\n"
        "b_random     50.0 %  50.0 %  50.0 %"
    )


def test_answers_as_text():
    found = report("predictor", "none")
    blocks = found.answers_text("all").split("\n\n")
    assert blocks[3] == (
        "image        cat.png\n"
        "question     ?\n"
        "truth        a\n"
        "b_predictor  b  [WRONG]\n"
        "b_none       a  [right]\n"
    )
    assert len(blocks) == 4
    assert found.answers_text("wrong") == blocks[3]
    assert report("none").answers_text("wrong") == ""


def test_report_as_markdown():
    text = report("predictor", "none").to_markdown()
    assert text.startswith("4 questions of q.json")
    assert (
        "\n**Accuracy: right / asked, share, 95 % interval**\n\n|  | b_predictor | b_none |\n"
        "| --- | ---: | ---: |\n"
        "| x | 2/2  100.0 % [34.2, 100.0] | 2/2  100.0 % [34.2, 100.0] |\n"
    ) in text
    assert "gain over random" not in text


def test_report_without_a_cache_has_no_kv():
    text = report("predictor", mode="recompute").to_text()
    assert "without KV cache" in text
    assert "KV at the end" not in text
    assert "sparse layer" not in text


def test_report_as_json():
    content = json.loads(json.dumps(report("predictor", "random").to_json()))
    first = content["bundles"][0]
    assert (content["data"], content["num_questions"]) == ("in/q.json", 4)
    assert (first["policy"], first["gain_over_random"]) == ("predictor", 50.0)
    assert first["summaries"]["y"]["accuracy"] == 0.5
    assert first["summaries"]["y"]["num_correct"] == 1
    # Wilson of 1/2, w = 1.96²/2 = 1.9207: ((.5 + w/2) ± sqrt(w/4 + w²/4)) / (1 + w)
    # = (1.4604 ± 1.1844) / 2.9207
    assert first["summaries"]["y"]["interval_95"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
    assert first["details"]["y"] == {}
    assert first["answers"][3] == {
        "name": "q", "type": "y", "text": "?", "answers": ["a"], "choices": [],
        "image": "cat.png", "truth": "a", "answer": "b", "is_correct": False, "score": 0.0,
        "num_tokens": 3, "num_kept_image_tokens": 7, "num_fed_tokens": 2,
        "num_kept_tokens": 1,
        "kv": {"bytes": 30, "dense_bytes": 40, "sparse_bytes": 10, "dense_sparse_bytes": 20},
    }  # fmt: skip


def test_gain_is_over_the_random_bundle_of_the_same_budget():
    found = report("predictor", "random")
    other = tuple(
        dataclasses.replace(a, text="a", score=1.0, num_kept_image_tokens=30)
        for a in found.results[1].answers
    )
    first = dataclasses.replace(found.results[1], answers=other)
    found = dataclasses.replace(found, results=(first, *found.results))
    assert [found.gain_over_random(result) for result in found.results] == [None, 50.0, None]


# Bundles.


@pytest.fixture(scope="module")
def answers(bundles):
    """What the sparse bundle says to each prompt, asked alone."""
    session = bundles.session("mha")
    found = {}
    for prompt in PROMPTS:
        (found[prompt],) = session.generate([prompt], [CAT], max_new_tokens=20)
    return found


@pytest.fixture
def questions(folder, answers):
    """Its own answers as the truth, but for the last question."""
    truths = {prompt: answers[prompt].text.upper() for prompt in PROMPTS}
    truths["w8 w9 w10"] = "w3"
    shutil.copyfile(CAT, folder / "whole_cat.png")
    records = [
        conversation(
            f"<image>\n{prompt}", truth, image="whole_cat.png", category=PROMPTS[prompt]
        )
        for prompt, truth in truths.items()
    ]
    return write(folder, *records)


def test_evaluate_bundles_side_by_side(bundles, questions, answers):
    paths = [bundles.path("mha"), bundles.path("mha", policy="random"),
             bundles.path("mha", policy="none")]  # fmt: skip
    settings = EvaluationSettings(batch_size=2, max_new_tokens=20)
    found = evaluate_bundles(paths, questions, settings)
    sparse, random, dense = found.results
    assert [result.policy for result in found.results] == ["predictor", "random", "none"]
    assert [result.name for result in found.results] == [path.name for path in paths]
    assert [a.text for a in sparse.answers] == [answers[p].text for p in PROMPTS]
    accuracies = {name: s.accuracy for name, s in sparse.summaries.items()}
    assert accuracies == {"short": 1.0, "long": 0.0, "total": pytest.approx(2 / 3)}
    assert sparse.total.kept_image_tokens == 7.0
    assert dense.total.kept_image_tokens == 36.0
    gain = found.gain_over_random(sparse)
    assert gain == pytest.approx(100 * (2 / 3 - random.total.accuracy))
    assert sparse.seconds_per_question > 0


def test_evaluate_counts_kv_bytes(bundles, questions, answers):
    settings = EvaluationSettings(batch_size=3, max_new_tokens=20)
    (result,) = evaluate_bundles([bundles.path("mha")], questions, settings).results
    geometry = bundles.session("mha").manifest.geometry
    row = 2 * geometry.num_kv_heads * geometry.head_dim * 4
    for one, prompt in zip(result.answers, PROMPTS, strict=True):
        alone = answers[prompt]
        full = alone.num_prompt_tokens + alone.num_fed_tokens
        sparse = alone.num_prompt_tokens - 29 + alone.num_kept_tokens  # 7 of 36 stay
        use = KVUse(
            2 * (full + sparse) * row, 4 * full * row, 2 * sparse * row, 2 * full * row
        )
        assert one.kv == use
    fed = sum(answers[p].num_fed_tokens for p in PROMPTS)
    kept = sum(answers[p].num_kept_tokens for p in PROMPTS)
    assert result.total.output_text_keep_rate == kept / fed


def test_evaluate_a_dense_bundle(bundles, questions):
    settings = dataclasses.replace(ONE, max_new_tokens=4)
    (result,) = evaluate_bundles(
        [bundles.path("mha", policy="none")], questions, settings
    ).results
    assert (result.total.output_text_keep_rate, result.total.kv_share) == (1.0, 1.0)
    assert result.total.sparse_kv_share is None


def test_evaluate_without_a_cache(bundles, questions, answers):
    settings = EvaluationSettings(max_new_tokens=3, mode="recompute")
    (result,) = evaluate_bundles([bundles.path("mha")], questions, settings).results
    assert [a.kv for a in result.answers] == [None] * 3
    assert (result.total.kept_image_tokens, result.total.kv_bytes) == (7.0, None)
    assert [a.text.split()[0] for a in result.answers] == [
        answers[p].text.split()[0] for p in PROMPTS
    ]


def test_evaluate_makes_room_for_the_longest_truth(bundles, folder):
    path = write(folder, line(answer="w3 w4 w5"), line())
    found = evaluate_bundles([bundles.path("mha")], path, ONE)
    assert found.settings.max_new_tokens == 1 + 3 + 1 + 16  # <s> w3 w4 w5 </s>


def test_evaluate_warns_of_answers_that_cannot_be_right(bundles, folder, caplog):
    path = write(folder, line(answer="w3 w4 w5"))
    settings = dataclasses.replace(ONE, max_new_tokens=3)
    with caplog.at_level(logging.WARNING, "dllava_export"):
        evaluate_bundles([bundles.path("mha")], path, settings)
    assert "the longest truth has 5 tokens and answers at most 3" in caplog.text


def test_evaluate_asks_the_first_questions_only(bundles, folder):
    path = write(folder, line(image=None), line(image=None, text="w8"), "bad")
    settings = dataclasses.replace(ONE, limit=2, max_new_tokens=2)
    (result,) = evaluate_bundles([bundles.path("mha")], path, settings).results
    assert [a.question.text for a in result.answers] == ["w5", "w8"]
    assert result.total.kept_image_tokens is None


def test_answers_of_like_length_go_together(bundles, folder, monkeypatch):
    from dllava_export.runtime.session import Session

    asked = []
    generate = Session.generate

    def note(self, prompts, images, **settings):
        asked.append(prompts)
        return generate(self, prompts, images, **settings)

    monkeypatch.setattr(Session, "generate", note)
    truths = {"w5": "w6 w7 w8", "w8": "w6", "w9": "w6 w7 w9", "w10": "w7"}
    path = write(folder, *(line(image=None, text=t, answer=a) for t, a in truths.items()))
    settings = EvaluationSettings(batch_size=2, max_new_tokens=2)
    (result,) = evaluate_bundles([bundles.path("mha")], path, settings).results
    assert asked == [["w8", "w10"], ["w5", "w9"]]
    assert [answer.question.text for answer in result.answers] == list(truths)


def test_bundles_of_the_same_name(bundles, folder):
    path = bundles.path("mha")
    settings = dataclasses.replace(ONE, max_new_tokens=1)
    found = evaluate_bundles([path, path], write(folder, line(image=None)), settings)
    assert [result.name for result in found.results] == [str(path)] * 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param(line(image="bad.png"), r"questions\.json, record 1 \(id 7\): Image file "
                     r"\S+bad\.png \(4 bytes\) cannot be decoded", id="image"),
        pytest.param(line(text="w5 " * 600), r"record 1 \(id 7\) has \d+ tokens with its answer, "
                     r"\d+ without; \S+ takes 512", id="question"),
        pytest.param(line(answer="w5 " * 600), r"record 1 \(id 7\) has \d+ tokens with its "
                     r"answer, 71 without; \S+ takes 512", id="answer"),
    ],
)  # fmt: skip
def test_records_that_do_not_fit_the_bundle(bundles, folder, record, message):
    (folder / "bad.png").write_bytes(b"nope")
    path = write(folder, line(), record)
    with pytest.raises(EvaluationError, match=message):
        evaluate_bundles([bundles.path("mha")], path, ONE)
    settings = dataclasses.replace(ONE, on_bad_record="skip", max_new_tokens=1)
    found = evaluate_bundles([bundles.path("mha")], path, settings)
    assert len(found.results[0].answers) == len(found.skipped) == 1
    assert "1 question of questions.json" in found.to_text()
    assert "1 record skipped" in found.to_text()


def test_no_usable_question(bundles, folder):
    settings = dataclasses.replace(ONE, on_bad_record="skip")
    message = r"no question that can be asked, .*the first bad one: questions\.json, record 0"
    with pytest.raises(EvaluationError, match=message):
        evaluate_bundles([bundles.path("mha")], write(folder, "bad"), settings)
    with pytest.raises(EvaluationError, match=r"expected at least one\."):
        evaluate_bundles([bundles.path("mha")], write(folder), settings)


def test_no_bundle(folder):
    with pytest.raises(EvaluationError, match="There is no bundle to evaluate"):
        evaluate_bundles([], write(folder, line()))


def test_a_bundle_without_a_tokenizer(bundles, folder):
    with pytest.raises(
        EvaluationError, match="has no tokenizer, and questions and answers are"
    ):
        evaluate_bundles([bundles.path("gqa")], write(folder, line()), ONE)


def test_a_bundle_without_a_vision_tower(bundles, folder):
    bare = folder / "bare"
    shutil.copytree(bundles.path("mha"), bare)
    manifest = json.loads((bare / layout.MANIFEST).read_text())
    (bare / layout.MANIFEST).unlink()
    (bare / layout.MANIFEST).write_text(json.dumps({**manifest, "has_visual": False}))
    with pytest.raises(
        EvaluationError, match=r"record 0 \(id 7\) has an image, and \S+bare has"
    ):
        evaluate_bundles([bare], write(folder, line()), ONE)


def test_a_folder_that_is_no_bundle(folder):
    with pytest.raises(BundleError, match="expected a bundle"):
        evaluate_bundles([folder], write(folder, line()))


def test_an_unknown_backend(bundles, folder):
    with pytest.raises(BackendError, match=r"^backend must be one of .*, got 'other'"):
        evaluate_bundles([bundles.path("mha")], write(folder, line()), ONE, backend="other")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, got -1"),
        ({"mode": "fast"}, "mode must be one of cache, recompute, got 'fast'"),
        ({"on_bad_record": "no"}, "on_bad_record must be stop or skip, got 'no'"),
    ],
)
def test_settings(values, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**values)


# Files and the command.


def test_command(bundles, questions, tmp_path):
    arguments = ["evaluate", bundles.path("mha"), bundles.path("mha", policy="random"),
                 questions, "--limit", 2, "--batch-size", 1, "--max-new-tokens", 2,
                 "--threads", 1, "--json", tmp_path / "a.json", "--markdown",
                 tmp_path / "a.md"]  # fmt: skip
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        "2 questions of questions.json, metric exact, greedy, with KV cache, batch"
    )
    assert result.stdout.endswith(f"Wrote {tmp_path}/a.json\nWrote {tmp_path}/a.md\n")
    assert len(json.loads((tmp_path / "a.json").read_text())["bundles"]) == 2
    assert "gain over random" in (tmp_path / "a.md").read_text()


def test_command_with_bad_data(bundles, folder):
    path = write(folder, "bad")
    result = CliRunner().invoke(cli.main, ["evaluate", str(bundles.path("mha")), str(path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "questions.json, record 0 is a JSON str" in result.stderr
