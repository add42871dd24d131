from __future__ import annotations

import pytest
from transformers import LlamaConfig

from dllava_export.errors import BundleError, CheckpointError
from dllava_export.families.config_file import check_sizes, read_json, transformers_config


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


def test_transformers_does_not_warn_above_an_error_of_ours(capfd, caplog):
    values = {"vocab_size": 10, "pad_token_id": 99, "eos_token_id": 99}
    assert transformers_config(LlamaConfig, "text configuration", values).vocab_size == 10
    with pytest.raises(CheckpointError):
        transformers_config(LlamaConfig, "text configuration", {**values, "vocab_size": "x"})
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
