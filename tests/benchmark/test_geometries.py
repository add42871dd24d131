from __future__ import annotations

import pytest

from dllava_export.benchmark.geometries import GEOMETRIES, SuiteSettings


@pytest.mark.parametrize(
    ("place", "name", "num_parameters"),
    [
        pytest.param(0, "smollm2_135m", 134_515_008, id="as SmolLM2-135M"),
        pytest.param(1, "hidden_2048", 542_148_608, id="wide"),
    ],
)
def test_decoders_have_the_published_size(place, name, num_parameters):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    geometry = GEOMETRIES[place]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**geometry.llama_config()))
    assert geometry.name == name
    assert sum(p.numel() for p in model.parameters()) == num_parameters


def test_prompt_is_image_and_text():
    assert SuiteSettings().num_image_tokens == 576
    assert SuiteSettings().num_prompt_tokens == 640


def test_caches_hold_prompt_answer_and_all_steps():
    settings = SuiteSettings(decode_lengths=(0, 10), decode_steps=3)
    # Each of 2 rounds at the longest length: one step to warm up, three that are timed.
    assert settings.max_tokens(2) == 640 + 10 + 2 * 4 + 1


def test_text_names_the_sizes():
    assert GEOMETRIES[0].to_text() == (
        "30 layers, hidden 576, 9 heads over 3 KV heads, MLP 1536, vocabulary 49152; "
        "predictors 128 wide"
    )
