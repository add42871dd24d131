"""What an export says and stores of prompts: chat template, first, last and padding tokens."""

from __future__ import annotations

import json

import checkpoint_factory as factory
import pytest
from word_tokenizer import save_tokenizer

from dllava_export import api
from dllava_export.bundles.manifest import read_manifest
from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.errors import SettingError
from dllava_export.prompts.tokenizer import ChatTokenizer

JINJA = (
    "{% for m in messages %}[{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}]"
)
JINJA += "{% endfor %}"


def export(tmp_path, layout="llava", files=None, changes=None, **settings):
    """Export a checkpoint with a tokenizer; return report, template and text of a question."""
    source = tmp_path / "in"
    factory.make_checkpoint(source, layout, changes={"vocab_size": 131, **(changes or {})})
    save_tokenizer(source)
    for name, content in (files or {}).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (source / name).write_text(text)
    report = api.export(source, tmp_path / "out", policy="none", **settings)
    manifest = read_manifest(tmp_path / "out")
    chat = ChatTokenizer.from_folder(
        tmp_path / "out/llm",
        template=manifest.chat_template,
        image_token_id=manifest.image_token_id,
    )
    return report, manifest.chat_template, chat.render("w5", with_image=True)


def test_an_unknown_template_is_guessed_with_a_warning(tmp_path):
    report, template, text = export(tmp_path)
    assert template == "vicuna_v1"
    assert text.endswith("USER: <image>\nw5 ASSISTANT:")
    (warning,) = report.warnings
    assert "vicuna_v1 is a guess: nothing in" in warning
    assert "--chat-template" in warning


@pytest.mark.parametrize("template", ["llama_2", "mistral_instruct", "chatml", "plain"])
def test_the_template_that_is_asked_for(tmp_path, template):
    report, stored, text = export(tmp_path, chat_template=template)
    assert stored == template
    assert "<image>\nw5" in text
    assert report.warnings == ()
    assert f"prompts   chat template {template}" in report.to_text()
    inspected = api.inspect(tmp_path / "out")
    assert inspected.to_json()["chat_template"] == template
    assert f"Prompts   chat template {template}" in inspected.to_text()


def test_the_template_that_the_configuration_states(tmp_path):
    report, template, text = export(tmp_path, changes={"conv_mode": "llava_llama_2"})
    assert (report.warnings, template) == ((), "llama_2")
    assert text.startswith("[INST] <<SYS>>")


def test_a_template_of_the_user_s(tmp_path):
    (tmp_path / "mine.jinja").write_text(JINJA)
    chat_template = str(tmp_path / "mine.jinja")
    report, template, text = export(tmp_path, chat_template=chat_template)
    assert (report.warnings, template, text) == ((), "checkpoint", "[<image>w5]")


def test_a_template_that_is_not_there(tmp_path):
    with pytest.raises(SettingError, match=r"expected one of vicuna_v1, .*or the path of a"):
        export(tmp_path, chat_template="vicuna")


def test_a_template_that_fails_is_warned_about(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ 'a' * 10000000000 }}")
    source = tmp_path / "in"
    factory.make_checkpoint(source, "llava", changes={"vocab_size": 131})
    save_tokenizer(source)
    report = api.export(
        source,
        tmp_path / "out",
        policy="none",
        chat_template=str(tmp_path / "mine.jinja"),
    )
    (warning,) = report.warnings
    assert "cannot be applied: it makes a value larger" in warning


@pytest.mark.parametrize("with_template", [False, True])
def test_a_llava_hf_checkpoint(tmp_path, with_template):
    files = {"chat_template.jinja": JINJA} if with_template else {}
    changes = {
        "text_config": {**factory.CONFIGS["llava-hf"]["text_config"], "vocab_size": 131}
    }
    report, template, text = export(tmp_path, "llava-hf", files=files, changes=changes)
    if with_template:
        assert (report.warnings, template, text) == ((), "checkpoint", "[<image>w5]")
    else:
        (warning,) = report.warnings
        assert template == "vicuna_v1"
        assert "has no chat template" in warning and "--chat-template vicuna_v1|" in warning


def test_ids_that_files_disagree_about(tmp_path):
    report, *_ = export(
        tmp_path,
        files={"generation_config.json": {"eos_token_id": [9, 7], "bos_token_id": 5}},
        changes={"conv_mode": "v1", "pad_token_id": 131, "eos_token_id": 2},
    )
    bos, eos, pad = report.warnings
    assert "bos_token_id" in bos and "pad_token_id 131" in pad
    assert "generation_config.json says 9, 7" in eos and "used: 2, 7, 9." in eos
    assert read_manifest(tmp_path / "out").eos_token_ids == (2, 7, 9)


def test_a_padding_id_beyond_the_vocabulary_is_not_needed(tmp_path):
    factory.make_checkpoint(tmp_path, "llava", changes={"pad_token_id": 4000})
    spec = read_checkpoint(tmp_path).spec
    assert spec.text_config.pad_token_id is None
    assert spec.decoder().module is not None
