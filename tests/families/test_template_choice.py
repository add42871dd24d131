from __future__ import annotations

import pytest

from dllava_export.errors import SettingError
from dllava_export.families.template_choice import choose_template


@pytest.mark.parametrize(
    ("folder", "config", "default", "expected", "is_guess"),
    [
        pytest.param("x", {}, "vicuna_v1", "vicuna_v1", True, id="nothing says it"),
        pytest.param("llava-v1.5-7b", {}, "vicuna_v1", "vicuna_v1", False, id="its name"),
        pytest.param("llava-llama-2-13b-chat", {}, "vicuna_v1", "llama_2", True, id="llama-2"),
        pytest.param("x", {"_name_or_path": "mistralai/Mistral-7B"}, "vicuna_v1",
                     "mistral_instruct", True, id="mistral, by the decoder's name"),
        pytest.param("llava-v1.5-7b", {"conv_mode": "llava_llama_2"}, "vicuna_v1", "llama_2",
                     False, id="conv_mode"),
        pytest.param("x", {"version": "plain"}, "vicuna_v1", "plain", False, id="version"),
        pytest.param("x", {"version": "1.0.3"}, "vicuna_v1", "vicuna_v1", True,
                     id="another version"),
        pytest.param("x", {"conv_mode": "v7"}, "vicuna_v1", "vicuna_v1", True,
                     id="unknown conv_mode"),
        pytest.param("llava-1.5-7b-hf", {}, "checkpoint", "vicuna_v1", True,
                     id="llava-hf without a template"),
    ],
)  # fmt: skip
def test_chooses_what_the_checkpoint_says(
    tmp_path, folder, config, default, expected, is_guess
):
    choice = choose_template(None, default, config, tmp_path / folder)
    assert choice.name == expected
    assert (choice.warning is not None) == is_guess
    if is_guess:
        assert f"{expected} is a guess" in choice.warning
        assert "--chat-template vicuna_v1|" in choice.warning


def test_the_user_s_choice_counts(tmp_path):
    config = {"conv_mode": "v1"}
    assert choose_template("plain", "vicuna_v1", config, tmp_path).name == "plain"
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 1 }}")
    choice = choose_template(str(file), "vicuna_v1", config, tmp_path)
    assert (choice.name, choice.source, choice.warning) == ("checkpoint", "{{ 1 }}", None)
    for asked, found in (("v9", "chat_template is 'v9'"), ("checkpoint", "has no chat tem")):
        with pytest.raises(SettingError, match=f"{found}.*expected one of vicuna_v1, .*file"):
            choose_template(asked, "vicuna_v1", config, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}")
    assert choose_template("checkpoint", "vicuna_v1", config, tmp_path).name == "checkpoint"
    assert choose_template(None, "checkpoint", config, tmp_path).warning is None
