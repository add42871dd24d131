from __future__ import annotations

import math
import os

import pytest
from transformers import LlamaConfig

from dllava_export.errors import BundleError, CheckpointError
from dllava_export.families.config_file import (
    check_kinds,
    check_sizes,
    read_json,
    transformers_config,
)
from dllava_export.families.config_kinds import (
    FLAG,
    LIST,
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    TEXTS,
    WHOLE,
    WHOLES,
)


def test_reads_an_object(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "a checkpoint") == {"a": 1}


@pytest.mark.parametrize("error_type", [CheckpointError, BundleError])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(None, "is not a thing: it has no a.json", id="missing"),
        pytest.param("{", "is not a thing: a.json cannot be read as JSON", id="no JSON"),
        pytest.param("[]", "holds a JSON list, expected an object", id="no object"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path, text, message, error_type):
    if text is not None:
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(error_type, match=message):
        read_json(tmp_path / "a.json", "a thing", error_type)


def test_says_what_transformers_refuses():
    with pytest.raises(
        CheckpointError, match=r"The text configuration of config\.json cannot"
    ):
        transformers_config(LlamaConfig, "text configuration", {"hidden_size": "wide"})


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None])
def test_sizes_are_whole_numbers_of_at_least_one(value):
    config = LlamaConfig()
    config.__dict__["hidden_size"] = value
    with pytest.raises(
        CheckpointError, match=f"It has hidden_size {value!r}, expected a whole"
    ):
        check_sizes("It", config, ("hidden_size",))


def test_sizes_have_a_limit():
    config = LlamaConfig(num_hidden_layers=2)
    config.__dict__["num_hidden_layers"] = 1025
    with pytest.raises(CheckpointError, match="num_hidden_layers 1025, expected at most 1024"):
        check_sizes("It", config, ("num_hidden_layers",))


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (TEXT, ["", "a"], [1, ["a"]]),
        (FLAG, [True], [1, "true"]),
        (WHOLE, [0, -(1 << 63)], [True, 1.0, 1 << 63, "1"]),
        (NUMBER, [0, 0.5], [False, math.nan, math.inf, "1"]),
        (OBJECT, [{}], [[], ""]),
        (LIST, [[], [1]], [{}, ""]),
        (TEXTS, [[], ["a"]], ["a", [1]]),
        (NUMBERS, [[1, 0.5]], [1, [None]]),
        (WHOLES, [[1]], [1, [0.5]]),
    ],
)
def test_kinds(kind, good, bad):
    for value in [None, *good]:
        check_kinds({"a": {"b": value}}, {"a.b": (kind,)}, "c.json")
    for value in bad:
        with pytest.raises(CheckpointError) as caught:
            check_kinds({"a": {"b": value}}, {"a.b": (kind,)}, "c.json")
        assert f"c.json: a.b is {value!r}, expected {kind}. Restore" in str(caught.value)


def test_a_value_may_be_of_several_kinds_and_of_any_key():
    kinds = {"*.a": (TEXT, WHOLES)}
    check_kinds({"x": {"a": "1"}, "y": {"a": [1]}, "z": 3}, kinds, "c.json")
    message = r"c.json: y.a is 1, expected a text or a list of whole numbers. Do it again"
    with pytest.raises(BundleError, match=message):
        check_kinds({"y": {"a": 1}}, kinds, "c.json", BundleError, remedy="Do it again.")
    for values in ({"y": {}}, {"y": {"a": None}}, {"y": 3}):
        with pytest.raises(CheckpointError, match=r"y\.a is absent, expected a text or"):
            check_kinds(values, kinds, "c.json", required=True)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(CheckpointError) as caught:
        check_kinds({"a": "b" * 10**6}, {"a": (WHOLE,)}, "c.json")
    assert len(str(caught.value)) < 200


def test_a_file_has_a_limit_and_is_a_file(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        CheckpointError, match="1099511627776 bytes, expected at most 67108864"
    ):
        read_json(tmp_path / "a.json", "a thing")
    os.mkfifo(tmp_path / "b.json")
    with pytest.raises(CheckpointError, match="it is a folder or a device, expected a file"):
        read_json(tmp_path / "b.json", "a thing")


def test_kinds_are_checked_while_reading(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"/a.json: a is 1, expected a text"):
        read_json(tmp_path / "a.json", "a thing", kinds={"a": (TEXT,)})
