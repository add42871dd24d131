from __future__ import annotations

import json

import pytest
from word_tokenizer import save_tokenizer

from dllava_export.errors import BundleError
from dllava_export.families.special_token_ids import (
    contradictions,
    end_ids,
    stated_ids,
    tokenizer_ids,
)
from dllava_export.prompts.tokenizer import ChatTokenizer

DECODER = {"0": {"content": "<unk>", "special": True}}
ADDED = [{"id": 2, "content": "</s>"}, {"id": 9, "content": "<|eot|>"}]


def write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return stated_ids(folder)


def test_an_empty_folder_says_nothing(tmp_path):
    stated = stated_ids(tmp_path)
    assert end_ids(stated) == ()
    assert contradictions(stated, 10) == []


def test_every_file_has_a_say(tmp_path):
    stated = write(
        tmp_path,
        config={"eos_token_id": 2, "text_config": {"bos_token_id": 1, "eos_token_id": 7}},
        generation_config={"eos_token_id": [2, 9], "pad_token_id": 0},
        tokenizer_config={"eos_token": {"content": "</s>"}, "pad_token": "<pad>"},
        tokenizer={"added_tokens": ADDED, "model": {"vocab": {"<pad>": 0}}},
    )
    assert stated["bos"] == {"config.json": (1,)}
    assert stated["pad"] == {"generation_config.json": (0,), "tokenizer_config.json": (0,)}
    assert end_ids(stated) == (2, 9)
    assert contradictions(stated, 10) == []


def test_a_tokenizer_without_json_knows_its_added_tokens(tmp_path):
    decoder = {"2": {"content": "</s>"}}
    stated = write(
        tmp_path, tokenizer_config={"eos_token": "</s>", "added_tokens_decoder": decoder}
    )
    assert stated["eos"] == {"tokenizer_config.json": (2,)}


def test_several_ends_all_count(tmp_path):
    """As in LLaMA-3: the base model's end in one file, the end of a turn in others."""
    stated = write(
        tmp_path,
        config={"eos_token_id": 5},
        generation_config={"eos_token_id": [5, 8, 9]},
        tokenizer_config={"eos_token": "<|eot|>"},
        tokenizer={"added_tokens": ADDED},
    )
    assert end_ids(stated) == (5, 8, 9)


def test_files_that_disagree(tmp_path):
    stated = write(
        tmp_path,
        config={"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 32001},
        generation_config={"eos_token_id": 9, "bos_token_id": 3},
    )
    assert end_ids(stated) == (9,)
    bos, eos, pad = contradictions(stated, 10)
    assert bos.startswith("files disagree about bos_token_id: config.json says 1; generation")
    assert eos.endswith("generation_config.json says 9; used: 9. Correct them.")
    assert pad.startswith(
        "pad_token_id 32001 is not in the vocabulary of 10: config.json says"
    )


@pytest.mark.parametrize("value", ["2", True, 2.0, None, {"a": 1}, [None, "x"]])
def test_what_is_no_id_says_nothing(tmp_path, value):
    stated = write(tmp_path, config={"eos_token_id": value}, tokenizer_config={"eos_token": 2})
    assert stated["eos"] == {}


def test_odd_files(tmp_path):
    files = {"tokenizer": {"added_tokens": [3], "model": []}, "config": {"text_config": 1}}
    assert write(tmp_path, **files, tokenizer_config={"added_tokens_decoder": [1]})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BundleError, match=r"config\.json holds a JSON list"):
        stated_ids(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="nothing said"),
        pytest.param({"pad_token": "<unk>", "unk_token": "<unk>"}, id="unknown as padding"),
        pytest.param({"pad_token": {"__type": "AddedToken", "content": "w7"}}, id="a word"),
        pytest.param({"pad_token": "<unk>", "added_tokens_decoder": DECODER}, id="decoder"),
        pytest.param({"pad_token": "</s>", "eos_token": "</s>", "bos_token": "<s>"}, id="end"),
        pytest.param({"pad_token": None}, id="null"),
        pytest.param({"bos_token": "<s>", "add_bos_token": True}, id="start"),
    ],
)
@pytest.mark.parametrize("special", [{}, {"pad_token": "w5", "eos_token": "</s>"}], ids=len)
def test_a_tokenizer_s_ids_are_those_of_transformers(tmp_path, config, special):
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    chat = ChatTokenizer.from_folder(tmp_path, template="vicuna_v1", image_token_id=-200)
    assert tokenizer_ids(tmp_path) == chat.special_ids
