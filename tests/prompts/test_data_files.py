"""Question files and conversation files alike: text, numbers, and pictures inside a folder."""

from __future__ import annotations

import codecs
import json
import os

import pytest
from click.testing import CliRunner
from PIL import Image

from dllava_export import cli
from dllava_export.errors import DllavaExportError
from dllava_export.evaluation.questions import EvaluationError, read_questions
from dllava_export.prompts.data_files import OutsideError, image_file
from dllava_export.training.data import parse_record
from dllava_export.training.settings import BadRecordError


def conversation(question="<image>\nWhat?", answer="A cat.", image="cat.png"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "7", "image": image, "conversations": turns}


def question(text="What?", answer="A cat.", **others):
    return {"question_id": 7, "text": text, "answer": answer, **others}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for place in ("images/cat.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    (tmp_path / "images/link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "images/inner.png").symlink_to(tmp_path / "images/cat.png")
    return tmp_path


def read(path, **settings):
    return list(read_questions(path, path.parent / "images", **settings))


def test_line_separators_inside_a_text(folder):
    path = folder / "questions.jsonl"
    texts = ["a\u2028b", "a\x85b", "a\u2029b\x0bc\x0cd\x1ee"]
    lines = [json.dumps(question(text), ensure_ascii=False) for text in texts]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    # JSON has no place for control characters in a text, which the last one begins to use.
    skipped = []
    found = [q.text for q in read(path, skipped=skipped)]
    assert found == texts[:2] or found == texts
    assert len(found) + len(skipped) == 3


@pytest.mark.parametrize("form", ["lines", "list"])
def test_a_byte_order_mark(folder, form):
    path = folder / "questions.json"
    text = json.dumps(question() if form == "lines" else [question()])
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert [q.text for q in read(path)] == ["What?"]


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (0, "0"), (-2.5, "-2.5"), (10**400, "1" + "0" * 400)]
)
def test_numbers_as_answers(folder, value, text):
    path = folder / "questions.json"
    path.write_text(json.dumps([question(answer=value), conversation(answer=value)]))
    assert [q.truth for q in read(path)] == [text, text]


@pytest.mark.parametrize("value", [True, None, [[3]], float("nan"), float("inf")])
def test_what_is_no_answer(folder, value):
    path = folder / "questions.json"
    for entry in (question(answer=value), conversation(answer=value)):
        path.write_text(json.dumps([entry]))
        with pytest.raises(EvaluationError, match=r"expected .*text"):
            read(path)


def test_half_a_character(folder):
    path = folder / "questions.json"
    path.write_text(json.dumps([conversation(answer="a\ud800")]))
    with pytest.raises(EvaluationError, match="half of a surrogate pair"):
        read(path)


@pytest.mark.parametrize("text", ["[" * 200_000, "[[[[" * 1000 + "{", "{" * 9])
def test_nested_json(folder, text):
    path = folder / "questions.json"
    path.write_text(text)
    with pytest.raises(EvaluationError, match="cannot be read as JSON"):
        read(path)


@pytest.mark.parametrize("device", ["/dev/zero", "pipe"])
def test_files_without_an_end(folder, device):
    path = folder / device
    if device == "pipe":
        os.mkfifo(path)
    with pytest.raises(EvaluationError, match="is not a regular file"):
        list(read_questions(path))


OUTSIDE = ["../outside.png", "link.png", "images/../../outside.png"]


@pytest.mark.parametrize("name", [*OUTSIDE, "absolute"])
def test_pictures_outside_the_folder(folder, name):
    name = str(folder / "outside.png") if name == "absolute" else name
    images = folder / "images"
    (images / "images").mkdir()
    with pytest.raises(OutsideError, match=r"leads to .*--allow-outside"):
        image_file(images, name)
    assert image_file(images, name, allow_outside=True).is_file()
    with pytest.raises(BadRecordError, match=r"\(id '7'\): the image .* outside"):
        parse_record(conversation(image=name), "place", images, needs_image=True)
    record = parse_record(
        conversation(image=name), "place", images, needs_image=True, allow_outside=True
    )
    assert record.image == images / name
    path = folder / "questions.json"
    path.write_text(json.dumps([question(image=name)]))
    with pytest.raises(EvaluationError, match="--allow-outside"):
        read(path)
    assert [q.image for q in read(path, allow_outside=True)] == [images / name]


def test_pictures_inside_the_folder(folder):
    images = folder / "images"
    inside = ["cat.png", "inner.png", str(images / "cat.png"), "../images/cat.png"]
    assert all(image_file(images, name) for name in inside)
    # A folder that is itself a link holds what it leads to.
    (folder / "alias").symlink_to(images)
    assert image_file(folder / "alias", "cat.png") is not None


@pytest.mark.parametrize("name", ["no.png", "a\0b", "x" * 5000, "loop", "."])
def test_pictures_that_are_not_there(folder, name):
    images = folder / "images"
    (images / "loop").symlink_to(images / "loop")
    assert image_file(images, name) is None
    with pytest.raises(DllavaExportError, match="does not exist"):
        parse_record(conversation(image=name), "place", images, needs_image=True)


@pytest.mark.parametrize("command", ["evaluate", "train-predictors"])
def test_the_commands_have_the_option(command):
    result = CliRunner().invoke(cli.main, [command, "--help"])
    assert "--allow-outside" in result.output


def test_evaluate_takes_the_option(bundles, folder):
    path = folder / "questions.json"
    path.write_text(json.dumps([question("w5", "w6", image="link.png")]))
    arguments = ["evaluate", str(bundles.path("mha")), str(path)]
    arguments += ["--image-folder", str(folder / "images"), "--max-new-tokens", "2"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 1
    assert "--allow-outside" in result.stderr
    result = CliRunner().invoke(cli.main, [*arguments, "--allow-outside"])
    assert result.exit_code == 0, result.output
