from __future__ import annotations

import dataclasses

import pytest

from dllava_export.backends.trt.build.build_options import BuildOptions
from dllava_export.backends.trt.build.build_plan import load_structure, plan_build
from dllava_export.backends.trt.build.profile_shapes import ShapeOverrides
from dllava_export.backends.trt.engine_config import ProfileShapes
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import BundleError

NUM_IMAGE, NUM_KEPT_IMAGE, POSITIONS = 36, 7, 512  # of the golden bundle `mha`


@pytest.fixture
def planned(bundles):
    """Return a function that plans a golden bundle, with changes to its manifest."""

    def plan(checkpoint="mha", manifest=None, sparsity=None, **options):
        folder = bundles.path(checkpoint, "fp16", **(sparsity or {}))
        found = dataclasses.replace(read_manifest(folder, verify=False), **(manifest or {}))
        return plan_build(folder, found, BuildOptions("tensorrt-rtx", **options))

    return plan


def profiles(plan):
    return {
        (engine.name, profile): shapes
        for engine in plan.engines
        for profile, shapes in engine.profiles.items()
    }


def test_profiles_of_every_engine(planned):
    found = profiles(planned())
    assert list(found) == [
        ("decoder", "prefill"),
        ("decoder", "decode"),
        ("visual", "visual"),
        ("recompute", "recompute"),
    ]
    assert found["decoder", "decode"]["inputs_embeds"] == ProfileShapes(*[(1, 1, 64)] * 3)
    assert found["visual", "visual"]["pixel_values"] == ProfileShapes(*[(1, 3, 84, 84)] * 3)


def test_prefill_takes_every_prompt_up_to_the_longest(planned):
    prefill = profiles(planned(max_input_len=200, max_batch_size=3))["decoder", "prefill"]
    assert prefill["position_ids"] == ProfileShapes((1, 1), (3, 100), (3, 200))
    num_opt_kept = 100 - NUM_IMAGE + NUM_KEPT_IMAGE
    assert prefill["num_kept"] == ProfileShapes((1,), (num_opt_kept,), (200,), is_values=True)
    assert prefill["num_image_rows"] == ProfileShapes((0,), (36,), (36,), is_values=True)


def test_capacities_follow_the_plan_of_the_caches(planned):
    plan = planned(max_input_len=100, max_kv_cache_capacity=301)
    num_kept = 100 - NUM_IMAGE + NUM_KEPT_IMAGE
    assert plan.kv.capacities["full"] == 301
    assert plan.kv.capacities["sparse"] == num_kept + (200 // 2 + 64) + 1
    prefill = profiles(plan)["decoder", "prefill"]
    assert prefill["past_key_values.0.key"].max == (1, 4, 301, 16)
    assert prefill["past_key_values.2.key"].min == (1, 4, plan.kv.capacities["sparse"], 16)


def test_defaults_share_a_small_context_between_prompt_and_answer(planned):
    plan = planned()
    assert plan.kv.capacities["full"] == POSITIONS + 1
    assert plan.max_input_len == NUM_IMAGE + (POSITIONS - NUM_IMAGE) // 2


def test_default_prompt_of_a_large_context(planned):
    assert planned(manifest={"max_position_embeddings": 4096}).max_input_len == NUM_IMAGE + 512


def test_no_prompt_keeps_more_rows_than_the_sparse_caches_hold(planned):
    plan = planned(max_input_len=500, max_kv_cache_capacity=501)
    assert plan.kv.capacities["sparse"] == 500 - NUM_IMAGE + NUM_KEPT_IMAGE + 1
    assert profiles(plan)["decoder", "prefill"]["num_kept"].max == (471,)


def test_dense_decoder_has_one_capacity_and_no_selection(planned):
    plan = planned(sparsity={"policy": "none"})
    assert plan.kv.groups[-1].name == "full"
    assert "num_kept" not in profiles(plan)["decoder", "prefill"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_input_len": 3900, "max_kv_cache_capacity": 5000}, "TopK.* takes K up to 3840"),
        (
            {"max_input_len": 200, "max_kv_cache_capacity": 200},
            "max_kv_cache_capacity is 200, expected at least 201",
        ),
        ({"max_input_len": 30}, "max_input_len is 30, expected at least 36"),
        (
            {"overrides": ShapeOverrides(opt={"attention_mask": (1, 2)})},
            "no input 'attention_mask' to give a shape; the graphs have inputs_embeds, ",
        ),
    ],
)
def test_refuses(planned, options, message):
    with pytest.raises(ValueError, match=message):
        planned(**options)


def test_dense_decoder_takes_longer_prompts_than_topk(planned):
    options = {"max_input_len": 3900, "max_kv_cache_capacity": 5000}
    assert planned(sparsity={"policy": "none"}, **options).max_input_len == 3900


def test_overrides_reach_every_graph_that_has_the_input(planned):
    overrides = ShapeOverrides(
        opt={"inputs_embeds": (1, 80, 64), "pixel_values": (2, 3, 84, 84)}
    )
    found = profiles(planned(max_batch_size=2, overrides=overrides))
    assert found["decoder", "prefill"]["position_ids"].opt == (1, 80)
    assert found["decoder", "decode"]["position_ids"].opt == (1, 1)
    assert found["recompute", "recompute"]["position_ids"].opt == (1, 80)
    assert found["visual", "visual"]["pixel_values"].opt == (2, 3, 84, 84)


def test_memory_follows_the_largest_graph(planned):
    plan = planned()
    largest = max(engine.weight_bytes for engine in plan.engines)
    assert largest > 0
    assert plan.memory_bytes == int(1.7 * largest) + (768 << 20)
    assert plan.to_json()["memory_bytes"] == plan.memory_bytes


def test_text_names_shapes_and_sizes(planned):
    text = planned(max_input_len=200, max_kv_cache_capacity=401).to_text()
    for part in (
        "up to 1 samples of 200 rows",
        "capacity_full    401 rows, 2 layers",
        "  profile prefill",
        "past_key_values.0.key to past_key_values.1.value  [1x4x401x16]",
        "num_image_rows",
        "[0]  [36]  [36] (values)",
    ):
        assert part in text


def test_graph_that_is_no_onnx(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\xff not an onnx file")
    with pytest.raises(BundleError, match=r"x\.onnx cannot be read as an ONNX model"):
        load_structure(tmp_path / "x.onnx")
    with pytest.raises(BundleError, match="cannot be read as an ONNX model"):
        load_structure(tmp_path / "none.onnx")
