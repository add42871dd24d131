from __future__ import annotations

import json

import checkpoint_factory as factory
import pytest
from golden import DATA, golden_shapes

from dllava_export.checkpoints.canonical import expected_shapes
from dllava_export.errors import CheckpointError, UnsupportedModelError
from dllava_export.families.llava import LlavaFamily, original_renames

FAMILY = LlavaFamily()


def describe(layout="llava", *, preprocessor=None, **changes):
    config = {**factory.CONFIGS[layout], **changes}
    return FAMILY.describe(
        config, layout, tower=factory.VISION_CONFIG, preprocessor=preprocessor
    )


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_modules_have_the_golden_names_and_shapes(name):
    config = json.loads((DATA / name / "config.json").read_text(encoding="utf-8"))
    tower = json.loads((DATA / name / "vision_tower" / "config.json").read_text())
    spec = FAMILY.describe(config, "dynamic-llava", tower=tower)
    assert expected_shapes(spec) == golden_shapes(name)


@pytest.mark.parametrize("layout", ["llava", "dynamic-llava", "llava-hf"])
def test_layouts_are_told_apart(layout):
    assert FAMILY.detect(factory.CONFIGS[layout]) == layout


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"model_type": "qwen3_vl"}, id="another model"),
        pytest.param({**factory.ORIGINAL_CONFIG, "architectures": ["Q"]}, id="architecture"),
        pytest.param({"model_type": "llava_next", "text_config": {}}, id="LLaVA-1.6"),
        pytest.param({"model_type": "llama"}, id="bare decoder"),
        pytest.param({}, id="nothing"),
    ],
)
def test_other_models_are_not_detected(config):
    assert FAMILY.detect(config) is None


@pytest.mark.parametrize("model_type", ["llama", None])
def test_a_bare_llama_is_completed_where_asked_for(model_type):
    config = {**factory.TEXT_CONFIG, "model_type": model_type}
    assert FAMILY.detect(config, bare_decoder=True) == "llava"
    spec = FAMILY.describe(config, "llava", tower=factory.VISION_CONFIG)
    assert spec.projector.num_layers == 2


def test_refusals_say_why():
    with pytest.raises(
        UnsupportedModelError, match="with a sparse_config, expected one or the"
    ):
        FAMILY.detect({**factory.HF_CONFIG, "sparse_config": {}})
    with pytest.raises(CheckpointError, match="but has no sparse_config"):
        FAMILY.detect({**factory.DYNAMIC_CONFIG, "sparse_config": None})


@pytest.mark.parametrize("layout", list(factory.CONFIGS))
def test_keys_of_a_layout_have_canonical_names_and_back(layout):
    names = list(expected_shapes(describe(layout.split(" ")[0])))
    stored = {factory.stored_key(name, layout): name for name in names}
    renames = FAMILY.renames(factory.CONFIGS[layout], layout.split(" ")[0], stored)
    assert {key: renames.canonical(key) for key in stored} == stored
    back = {renames.stored(name): name for name in names}
    assert {key: renames.canonical(key) for key in back} == back


def test_single_layer_projector_has_no_number_in_original_layouts():
    renames = FAMILY.renames(
        {"model_type": "llava", "mm_projector_type": "linear"}, "llava", []
    )
    assert renames == original_renames(is_linear=True)
    assert renames.stored("projector.0.bias") == "model.mm_projector.bias"
    assert renames.canonical("model.mm_projector.bias") == "projector.0.bias"
    assert original_renames(is_linear=False).canonical("model.mm_projector.bias") != (
        "projector.0.bias"
    )


def test_tower_of_the_original_layouts_may_lie_outside():
    tower = FAMILY.outside_tower(factory.ORIGINAL_CONFIG, "llava")
    assert (tower.config_key, tower.name, tower.config) == (
        "mm_vision_tower",
        "vision_tower",
        None,
    )
    assert FAMILY.outside_tower(factory.HF_CONFIG, "llava-hf") is None


def test_published_tower_is_known_without_its_folder():
    config = {
        **factory.ORIGINAL_CONFIG,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    assert FAMILY.outside_tower(config, "llava").config["image_size"] == 336


def test_configuration_of_a_tower_inside_goes_before_a_published_one():
    config = {**factory.ORIGINAL_CONFIG, "mm_vision_tower": "openai/clip-vit-large-patch14"}
    config["vision_config"] = factory.VISION_CONFIG
    assert FAMILY.outside_tower(config, "llava").config == factory.VISION_CONFIG


def test_spec_of_the_original_layout():
    spec = describe(image_aspect_ratio="pad")
    assert (spec.image_token_id, spec.chat_template) == (-200, "vicuna_v1")
    assert (spec.num_image_tokens, spec.image_aspect_ratio) == (4, "pad")
    assert (spec.num_layers, spec.max_position_embeddings) == (3, 64)
    assert spec.predictors is None


def test_spec_of_llava_hf():
    spec = describe("llava-hf", preprocessor={"do_pad": True})
    assert (spec.image_token_id, spec.chat_template) == (39, "checkpoint")
    assert spec.image_aspect_ratio == "pad"
    assert describe("llava-hf").image_aspect_ratio == "square"


def test_geometry_has_the_sizes_of_decoder_and_predictors():
    geometry = describe("dynamic-llava").geometry
    assert (geometry.num_layers, geometry.hidden_size, geometry.head_dim) == (3, 16, 8)
    assert (geometry.num_heads, geometry.num_kv_heads) == (2, 1)
    assert geometry.predictor.d_model == 8


def test_a_cut_decoder_remembers_what_is_stored():
    spec = FAMILY.describe(
        factory.ORIGINAL_CONFIG, "llava", tower=factory.VISION_CONFIG, num_decoder_layers=2
    )
    assert (spec.num_layers, spec.num_stored_layers) == (2, 3)


def test_modules_to_trace_leave_the_configuration_alone():
    spec = describe()
    before = spec.text_config.to_dict(), spec.vision_config.to_dict()
    decoder, visual = spec.decoder(), spec.visual()
    assert (spec.text_config.to_dict(), spec.vision_config.to_dict()) == before
    assert list(decoder.inputs) == ["inputs_embeds", "position_ids"]
    assert list(visual.inputs) == ["pixel_values"]
    assert {value.device.type for value in decoder.example + visual.example} == {"meta"}
