"""Question files in the layouts in which LLaVA, VQA, POPE and lmms-eval's tasks have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dllava_export.evaluation.metrics.table import suitable_metric
from dllava_export.evaluation.questions import EvaluationError, Question, read_questions

TEN = ["cat"] * 7 + ["dog"] * 3


@pytest.fixture
def folder(tmp_path):
    for name in ("cat.png", "0a1b.jpg", "COCO_val2014_000000000042.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def lines(path: Path, *records: object, start: str = "") -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(start + text, encoding="utf-8")
    return path


def whole(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, indent=1))
    return path


def read(path: Path, **arguments: object) -> list[Question]:
    return list(read_questions(path, **arguments))


def metric_of(questions: list[Question]) -> str:
    return suitable_metric(question.expected for question in questions).name


def test_llava_questions_with_answers_of_their_own(folder):
    # playground/data/eval/*/*.jsonl of LLaVA, and an answer file as its model_vqa.py writes it.
    path = lines(
        folder / "q.jsonl",
        {"question_id": 0, "image": "cat.png", "text": "What?", "category": "conv"},
        {"question_id": 1, "image": "cat.png", "text": "Why?", "category": "detail"},
    )
    answers = lines(folder / "a.jsonl",
                    {"question_id": "1", "text": "So.", "answer_id": "x", "model_id": "m"},
                    {"question_id": "0", "prompt": "p", "text": "That."})  # fmt: skip
    assert read(path, answers=answers) == [
        Question("q.jsonl, line 1 (id 0)", "conv", "What?", ("That.",), folder / "cat.png"),
        Question("q.jsonl, line 2 (id 1)", "detail", "Why?", ("So.",), folder / "cat.png"),
    ]


def test_pope(folder):
    # coco_pope_random.json: an object in each line, although it is named .json.
    records = [{"question_id": n, "image": "cat.png", "text": "Is there a cat in the image?",
                "label": label} for n, label in ((1, "yes"), (2, "no"))]  # fmt: skip
    found = read(lines(folder / "coco_pope_random.json", *records))
    assert [q.answers for q in found] == [("yes",), ("no",)]
    assert found[1].name == "coco_pope_random.json, line 2 (id 2)"
    assert metric_of(found) == "pope"


def test_vqa_v2(folder):
    # v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json.
    path = whole(
        folder / "questions.json",
        {
            "info": {},
            "data_subtype": "val2014",
            "questions": [{"image_id": 42, "question": "What?", "question_id": 42000}],
        },
    )
    answers = whole(folder / "annotations.json", {"info": {}, "annotations": [{
        "question_id": 42000, "image_id": 42, "question_type": "what", "answer_type": "other",
        "multiple_choice_answer": "cat",
        "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": n}
                    for n, text in enumerate(TEN, 1)]}]})  # fmt: skip
    found = read(path, answers=answers)
    image = folder / "COCO_val2014_000000000042.jpg"
    name = "questions.json, record 0 (id 42000)"
    assert found == [Question(name, "other", "What?", tuple(TEN), image)]
    assert found[0].truth == "cat"
    assert metric_of(found) == "vqa"


def test_text_vqa(folder):
    # TextVQA_0.5.1_val.json: the list under `data`, pictures by id.
    record = {"question": "what brand?", "image_id": "0a1b", "question_id": 34602,
              "answers": TEN, "image_width": 8, "set_name": "val"}  # fmt: skip
    (found,) = read(whole(folder / "val.json", {"dataset_type": "val", "data": [record]}))
    assert (found.answers, found.image) == (tuple(TEN), folder / "0a1b.jpg")


def test_vizwiz(folder):
    # VizWiz's val.json: a list, answers as objects.
    answers = [{"answer": text, "answer_confidence": "yes"} for text in TEN]
    record = {"image": "cat.png", "question": "What?", "answers": answers,
              "answer_type": "other", "answerable": 1}  # fmt: skip
    (found,) = read(whole(folder / "val.json", [record]))
    assert (found.answers, found.type) == (tuple(TEN), "other")


def test_science_qa(folder):
    # lmms-eval's ScienceQA: options in a list, the answer counts from 0.
    record = {"question": "Which?", "choices": ["dog", "cat"], "answer": 1, "image": None}
    found = read(lines(folder / "q.jsonl", record))
    assert found[0].text == (
        "Which?\nA. dog\nB. cat\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (found[0].answers, found[0].choices) == (("B",), ("dog", "cat"))
    assert metric_of(found) == "multiple-choice"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"A": "dog", "B": "cat", "C": "nan", "D": None}, id="MMBench"),
        pytest.param({"choice_a": "dog", "choice_b": "cat"}, id="SEED-Bench"),
        pytest.param({"options": ["dog", "cat"]}, id="options"),
    ],
)
def test_options(folder, options):
    (found,) = read(
        lines(folder / "q.jsonl", {"question": "Which?", "answer": "B", **options})
    )
    assert (found.answers, found.choices) == (("B",), ("dog", "cat"))


def test_options_that_stand_in_the_question_are_not_repeated(folder):
    text = "Which?\nA. dog\nB. cat\nAnswer briefly."
    record = {"question": text, "choices": ["dog", "cat"], "answer": "cat"}
    (found,) = read(lines(folder / "q.jsonl", record))
    assert (found.text, found.answers) == (text, ("B",))


@pytest.mark.parametrize("image", [{"bytes": None, "path": "cat.png"}, ["cat.png"]])
def test_images_as_the_datasets_library_writes_them(folder, image):
    record = {"question": "What?", "answer": "cat", "image": image}
    (found,) = read(lines(folder / "q.jsonl", record))
    assert found.image == folder / "cat.png"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(5, ("5",)), (2.5, ("2.5",)), ([5, "five"], ("5", "five")), (0, ("0",))],
)
def test_numbers_and_lists(folder, answer, expected):
    (found,) = read(lines(folder / "q.jsonl", {"text": "How many?", "answer": answer}))
    assert found.answers == expected


@pytest.mark.parametrize("key", ["answer", "answers", "gt_answer", "gt_answers", "label"])
def test_names_of_answers(folder, key):
    (found,) = read(lines(folder / "q.jsonl", {"text": "How many?", key: ["5"]}))
    assert found.answers == ("5",)


def test_byte_order_mark_and_line_separators(folder):
    first = {"text": "a\u2028b", "answer": "c\u2029d\u0085e"}
    path = lines(folder / "q.jsonl", first, start="\ufeff")
    other = lines(folder / "r.jsonl", {"text": "w", "answer": "x"}, start="\ufeff")
    path.write_text(path.read_text(encoding="utf-8") + other.read_text(encoding="utf-8"))
    found = read(path)
    assert [(q.text, q.truth) for q in found] == [("a\u2028b", "c\u2029d\u0085e"), ("w", "x")]


def test_one_object_over_several_lines(folder):
    (found,) = read(whole(folder / "q.json", {"text": "w", "answer": "x"}))
    assert found.name == "q.json, record 0"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param({"question": "?", "answer": "a", "choices": "ab"},
                     "line 1 has the choices 'ab', expected a list of 2 to 26 texts",
                     id="choices"),
        pytest.param({"question": "?", "answer": "a", "image": ["a.png", "b.png"]},
                     "line 1 has the image .* expected the name of one file", id="two images"),
        pytest.param({"question": "?", "answer": "a", "image_id": 7},
                     r"line 1 has no image, and of its image_id 7 none is in .*, expected one "
                     r"of 7, 7\.jpg, 000000000007\.jpg, COCO_val2014", id="image_id"),
        pytest.param({"question": "?", "answer": "a", "image_id": "../cat"},
                     "line 1 has no image", id="image_id without a file"),
        pytest.param({"question_id": 3, "question": "?", "answer": {"text": "a"}},
                     r"line 1 \(id 3\) has the answer .*, expected the answer as text",
                     id="answer is an object"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_used(folder, record, message):
    with pytest.raises(EvaluationError, match=message):
        read(lines(folder / "q.jsonl", record))


@pytest.mark.parametrize(
    ("question", "answers", "message"),
    [
        pytest.param({"text": "?"}, [{"question_id": 1, "answer": "a"}],
                     r"q\.jsonl, line 1 has no question_id, expected one by which its answer in "
                     r"a\.jsonl is found", id="question without id"),
        pytest.param({"text": "?", "question_id": 2}, [{"question_id": 1, "answer": "a"}],
                     r"q\.jsonl, line 1 \(id '2'\) has no answer in a\.jsonl", id="no answer"),
        pytest.param({"text": "?", "question_id": 1}, [{"answer": "a"}],
                     r"a\.jsonl, line 1 has no question_id", id="answer without id"),
        pytest.param({"text": "?", "question_id": 1},
                     [{"question_id": 1, "answer": "a"}, {"question_id": "1", "answer": "b"}],
                     r"a\.jsonl, line 2 has the question_id '1', which an earlier record has",
                     id="twice"),
        pytest.param({"text": "?", "question_id": 1}, [{"question_id": 1}],
                     r"line 1 \(id 1\) has no 'answer'", id="empty answer"),
        pytest.param({"conversations": [], "id": 1}, [{"question_id": 1, "answer": "a"}],
                     r"q\.jsonl, line 1 has conversations, which hold their answers",
                     id="conversations"),
        pytest.param({"text": "?", "question_id": 1}, ["a"],
                     r"a\.jsonl, line 1 is a JSON str, expected an object .* Correct it\.$",
                     id="no object"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit(folder, question, answers, message):
    path = lines(folder / "q.jsonl", question)
    with pytest.raises(EvaluationError, match=message):
        read(path, answers=lines(folder / "a.jsonl", *answers))
