from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import checkpoint_factory as factory
import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from places import DATA

from dllava_export.checkpoints.checkpoint import random_checkpoint, read_checkpoint
from dllava_export.checkpoints.tensor_source import (
    MAX_TENSORS,
    RandomSource,
    safetensors_sources,
)
from dllava_export.errors import CheckpointError, UnsupportedModelError
from dllava_export.families.clip_tower import CLIP_FACTS
from dllava_export.geometry import PredictorConfig
from dllava_export.precision import BF16, FP32, NUMBER_FORMATS

TOWER = {"vision_config": factory.VISION_CONFIG}


def assert_same_values(folder: Path, expected: dict[str, np.ndarray]) -> None:
    tensors = read_checkpoint(folder).tensors
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name].read(), value, err_msg=name)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    factory.write_json(folder / "config.json", {**config, **changes})


def test_reads_the_golden_checkpoint() -> None:
    checkpoint = read_checkpoint(DATA / "gqa")
    assert checkpoint.spec.layout == "dynamic-llava"
    assert checkpoint.has_predictors
    assert not checkpoint.has_tokenizer
    assert checkpoint.spec.num_image_tokens == 64
    assert checkpoint.spec.image_token_id == -200
    assert checkpoint.spec.image_aspect_ratio == "pad"
    assert checkpoint.weight_format == FP32
    assert checkpoint.spec.text_config.num_key_value_heads == 2
    assert checkpoint.preprocessor["crop_size"] == {"height": 112, "width": 112}
    assert checkpoint.spec.predictors == PredictorConfig(
        d_model=32, nhead=4, dim_feedforward=64, sparse_layer=3, vision_keep_rate=0.29
    )


@pytest.mark.parametrize("layout", list(factory.CONFIGS))
@pytest.mark.parametrize("files", ["single", "sharded", "bin", "sharded bin"])
def test_reads_every_layout_and_file_kind(tmp_path: Path, layout: str, files: str) -> None:
    expected = factory.make_checkpoint(tmp_path, layout, files=files)
    assert_same_values(tmp_path, expected)
    assert read_checkpoint(tmp_path).spec.layout == layout.split(" ")[0]


@pytest.mark.parametrize("files", ["single", "bin"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(np.float16, "fp16"), (ml_dtypes.bfloat16, "bf16")]
)
def test_reads_half_precision(tmp_path: Path, files: str, dtype: type, precision: str) -> None:
    expected = factory.make_checkpoint(tmp_path, files=files, dtype=dtype)
    assert_same_values(tmp_path, expected)
    assert read_checkpoint(tmp_path).weight_format == NUMBER_FORMATS[precision]


def test_reads_data_that_are_not_aligned(tmp_path: Path) -> None:
    assert_same_values(tmp_path, factory.make_checkpoint(tmp_path, pad=3))


def test_chunks_join_to_the_tensor(tmp_path: Path) -> None:
    for files in ("single", "bin"):
        factory.make_checkpoint(tmp_path / files, files=files)
        source = read_checkpoint(tmp_path / files).tensors["lm_head.weight"]
        pieces = list(source.chunks(max_bytes=100))
        assert max(piece.nbytes for piece in pieces) <= 100
        np.testing.assert_array_equal(np.concatenate(pieces), source.read().reshape(-1))


def test_tower_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    assert_same_values(tmp_path, factory.make_checkpoint(tmp_path, "llava", tower="folder"))


def test_tower_may_be_a_whole_clip_model(tmp_path: Path) -> None:
    expected = factory.make_checkpoint(tmp_path, "llava", tower="folder")
    tower = {
        f"vision_model.{name}": value
        for name, value in expected.items()
        if factory.stored_key(name, "llava").startswith("model.vision_tower.")
    }
    extra = dict.fromkeys(
        ("text_model.final_layer_norm.weight", "visual_projection.weight", "logit_scale"),
        np.zeros(2, np.float32),
    )
    factory.write_weights(tmp_path / "vision_tower" / "model.safetensors", tower | extra)
    factory.write_json(
        tmp_path / "vision_tower" / "config.json",
        {"model_type": "clip", "vision_config": factory.VISION_CONFIG},
    )
    assert_same_values(tmp_path, expected)


def test_precision_is_the_widest_of_the_decoder(tmp_path: Path) -> None:
    values = factory.make_checkpoint(tmp_path, "llava", dtype=np.float16)
    stored = {factory.stored_key(name, "llava"): value for name, value in values.items()}
    stored["model.norm.weight"] = stored["model.norm.weight"].astype(ml_dtypes.bfloat16)
    factory.write_files(tmp_path, stored)
    assert read_checkpoint(tmp_path).weight_format == FP32


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlavaConfig.from_dict(dict(factory.HF_CONFIG))
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.spec.text_config.to_diff_dict() == config.text_config.to_diff_dict()
    assert checkpoint.spec.vision_config.to_diff_dict() == config.vision_config.to_diff_dict()
    parts = {
        "model.": model.model.language_model.state_dict(),
        "lm_head.": model.lm_head.state_dict(),
        "": model.model.vision_tower.state_dict(),
    }
    expected = {prefix + k: v for prefix, part in parts.items() for k, v in part.items()}
    projector = model.model.multi_modal_projector
    expected |= {"projector.0.weight": projector.linear_1.weight.detach()}
    expected |= {"projector.0.bias": projector.linear_1.bias.detach()}
    expected |= {"projector.2.weight": projector.linear_2.weight.detach()}
    expected |= {"projector.2.bias": projector.linear_2.bias.detach()}
    assert_same_values(tmp_path, {name: value.numpy() for name, value in expected.items()})


def test_llava_hf_settings(tmp_path: Path) -> None:
    factory.make_checkpoint(tmp_path, "llava-hf")
    factory.write_json(tmp_path / "preprocessor_config.json", {"do_pad": True})
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.spec.image_token_id == 39
    assert checkpoint.spec.image_aspect_ratio == "pad"
    assert checkpoint.has_tokenizer
    assert not checkpoint.has_predictors
    assert checkpoint.preprocessor == {"do_pad": True}


def test_preprocessor_defaults_to_clip(tmp_path: Path) -> None:
    factory.make_checkpoint(tmp_path)
    preprocessor = read_checkpoint(tmp_path).preprocessor
    assert preprocessor["size"] == {"shortest_edge": 28}
    assert preprocessor["image_mean"] == [0.48145466, 0.4578275, 0.40821073]


def test_preprocessor_may_be_nested(tmp_path: Path) -> None:
    factory.make_checkpoint(tmp_path, "llava-hf")
    settings = {"image_processor": {"size": {"shortest_edge": 30}}}
    factory.write_json(tmp_path / "processor_config.json", settings)
    assert read_checkpoint(tmp_path).preprocessor == {"size": {"shortest_edge": 30}}


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu"])
def test_reads_other_projectors(tmp_path: Path, kind: str) -> None:
    values = factory.make_checkpoint(tmp_path, "llava", changes={"mm_projector_type": kind})
    if kind == "linear":
        stored = {factory.stored_key(name, "llava"): value for name, value in values.items()}
        for part in ("weight", "bias"):
            value = stored.pop(f"model.mm_projector.0.{part}")
            stored[f"model.mm_projector.{part}"] = value
        factory.write_files(tmp_path, stored)
    assert_same_values(tmp_path, values)
    num_layers = {"linear": 1, "mlp3x_gelu": 3}[kind]
    assert read_checkpoint(tmp_path).spec.projector.num_layers == num_layers


def test_tied_embeddings_stand_in_for_lm_head(tmp_path: Path) -> None:
    values = factory.make_checkpoint(tmp_path, "llava", changes={"tie_word_embeddings": True})
    stored = {factory.stored_key(name, "llava"): value for name, value in values.items()}
    del stored["lm_head.weight"]
    factory.write_files(tmp_path, stored)
    tensors = read_checkpoint(tmp_path).tensors
    assert tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]


def test_reads_attention_and_mlp_biases(tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True}
    values = factory.make_checkpoint(tmp_path, "llava", changes=changes)
    assert "model.layers.0.self_attn.o_proj.bias" in values
    assert_same_values(tmp_path, values)


def test_ignores_buffers_of_old_versions(tmp_path: Path) -> None:
    values = factory.make_checkpoint(tmp_path, "llava", files="bin")
    stored = {
        factory.stored_key(name, "llava"): factory.torch_tensor(value)
        for name, value in values.items()
    }
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    prefix = "model.vision_tower.vision_tower.vision_model.embeddings"
    stored[f"{prefix}.position_ids"] = torch.zeros(5, dtype=torch.int64)
    torch.save(stored, tmp_path / "pytorch_model.bin")
    assert_same_values(tmp_path, values)


def test_keeps_the_first_decoder_layers(tmp_path: Path) -> None:
    factory.make_checkpoint(tmp_path)
    checkpoint = read_checkpoint(tmp_path, num_decoder_layers=2)
    assert checkpoint.spec.text_config.num_hidden_layers == 2
    layers = {n.split(".")[2] for n in checkpoint.tensors if n.startswith("model.layers.")}
    assert layers == {"0", "1"}
    with pytest.raises(ValueError, match=r"num_decoder_layers must be in 1\.\.3, got 4\."):
        read_checkpoint(tmp_path, num_decoder_layers=4)


def test_predictor_that_is_switched_off_may_stay_in_the_files(tmp_path: Path) -> None:
    factory.make_checkpoint(tmp_path)
    off = {**factory.SPARSE_CONFIG, "use_output_text_predictor": False}
    edit_config(tmp_path, sparse_config=off)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.spec.predictors is not None
    assert not checkpoint.spec.predictors.has_output_text
    assert not any(name.startswith("output_text") for name in checkpoint.tensors)


def test_well_known_tower_needs_no_network(tmp_path: Path) -> None:
    factory.make_sparse_7b(tmp_path, num_layers=3)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.spec.num_image_tokens == 576
    assert checkpoint.spec.vision_config.num_hidden_layers == 24
    assert checkpoint.spec.vision_config.hidden_size == 1024


def test_published_7b_has_728_tensors(tmp_path: Path) -> None:
    factory.make_sparse_7b(tmp_path)
    tensors = read_checkpoint(tmp_path).tensors
    assert len(tensors) == 728
    assert sum(source.num_bytes for source in tensors.values()) == 14_147_490_312


def test_tower_facts_are_those_of_the_published_ids() -> None:
    assert {name: facts["image_size"] for name, facts in CLIP_FACTS.items()} == {
        "openai/clip-vit-large-patch14-336": 336,
        "openai/clip-vit-large-patch14": 224,
    }


def test_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory.make_checkpoint(tmp_path, files="bin")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "pytorch_model*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_checkpoint("someone/llava").path == tmp_path
    assert asked == [("someone/llava", False), ("someone/llava", True)]


def test_hub_id_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="could not be downloaded from the hub: no net"):
        read_checkpoint("someone/llava")


def test_location_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id, expected"):
        read_checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file, expected a checkpoint folder"):
        read_checkpoint(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(None, "is not a checkpoint: it has no config.json", id="missing"),
        pytest.param(
            "{", "is not a checkpoint: config.json cannot be read as JSON", id="json"
        ),
        pytest.param("[]", "config.json holds a JSON list, expected an object", id="list"),
    ],
)
def test_config_that_is_no_config(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("llava", {"model_type": "mistral"}, "model_type 'mistral' with architectures"),
        (
            "llava",
            {"architectures": ["QwenVL"]},
            r"architectures \['QwenVL'\] is not supported",
        ),
        ("llava", {"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ("llava", {"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
        ("llava", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("llava", {"mm_projector_type": "identity"}, "mm_projector_type 'identity'"),
        ("llava", {"mm_use_im_start_end": True}, "mm_use_im_start_end is true"),
        ("llava", {"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type 'spatial'"),
        ("llava", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ("llava", {"mm_vision_select_feature": "cls_patch"}, "selected by 'cls_patch'"),
        ("llava", {"mm_vision_select_layer": -4}, r"layer is -4, expected one .* in -3\.\.2"),
        (
            "dynamic-llava",
            {"sparse_config": {**factory.SPARSE_CONFIG, "use_instruct_predictor": True}},
            "the instruct predictor is not supported",
        ),
        ("llava-hf", {"vision_feature_layer": [-2, -5]}, r"layer is \[-2, -5\]"),
        ("llava-hf", {"vision_feature_select_strategy": "full"}, "selected by 'full'"),
        ("llava-hf", {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        (
            "llava-hf",
            {"text_config": {"model_type": "mistral"}},
            "text model is of type 'mist",
        ),
        ("llava-hf", {"vision_config": {"model_type": "siglip"}}, "is of type 'siglip'"),
        ("llava-hf", {"sparse_config": {}}, "with a sparse_config, expected one or the other"),
    ],
)
def test_models_of_another_kind(
    tmp_path: Path, layout: str, changes: dict[str, object], message: str
) -> None:
    factory.make_checkpoint(tmp_path, layout)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_config": None}, "but has no sparse_config"),
        ({"sparse_config": [1]}, r"config.json: sparse_config is \[1\], expected an object"),
        ({"sparse_config": {"nhead": 3}}, "d_model must be a multiple of nhead"),
        ({"sparse_config": {"num_layers": 0}}, "num_layers must be a whole number"),
        ({"sparse_config": {"num_layers": 10**5}}, "num_layers must be at most 256, got"),
        ({"num_hidden_layers": 1 << 62}, "num_hidden_layers .* expected at most 1024"),
        ({"num_hidden_layers": 1000}, "has num_hidden_layers 1000, its weight files hold"),
        ({"sparse_config": {"vision_keep_rate": 1.5}}, r"must be in \(0, 1\], got 1.5"),
        ({"sparse_config": {"sparse_layer": 3}}, "sparse_layer 3, expected at most 2"),
        ({"hidden_size": "x"}, r"config.json: hidden_size is 'x', expected a whole number"),
        ({"hidden_size": 17}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "cannot be read: integer division"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3, expected a divisor"),
        ({"vocab_size": 0}, "vocab_size 0, expected a whole number"),
        ({"vocab_size": 1 << 62}, f"vocab_size {1 << 62}, expected at most 16777216"),
        ({"vocab_size": 1 << 70}, "vocab_size is 11805.*, expected a whole number"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf, expected a number"),
        ({"rope_scaling": {"factor": [1]}}, r"rope_scaling.factor is \[1\], expected a num"),
        ({"architectures": "Llava"}, "architectures is 'Llava', expected a list of texts"),
        ({"mm_use_im_start_end": "no"}, "mm_use_im_start_end is 'no', expected true or fal"),
        ({"mm_vision_tower": None}, "has no mm_vision_tower"),
        ({"mm_vision_tower": "/absent/tower"}, "/absent/tower is not a folder"),
    ],
)
def test_impossible_configurations(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    factory.make_checkpoint(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_config_without_sizes(tmp_path: Path) -> None:
    changes = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    factory.write_json(tmp_path / "config.json", changes | {"mm_vision_tower": "tower"})
    factory.write_weights(tmp_path / "model.safetensors", {})
    (tmp_path / "tower").mkdir()
    factory.write_json(tmp_path / "tower" / "config.json", factory.VISION_CONFIG)
    with pytest.raises(CheckpointError, match="lacks hidden_size, intermediate_size"):
        read_checkpoint(tmp_path)


def rewritten(folder: Path, **changes: np.ndarray | None) -> None:
    values = factory.make_checkpoint(folder)
    stored = {factory.stored_key(name, "dynamic-llava"): v for name, v in values.items()}
    stored |= {key.replace("__", "."): value for key, value in changes.items()}
    stored = {key: value for key, value in stored.items() if value is not None}
    factory.write_files(folder, stored)


def test_missing_unknown_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    rewritten(
        tmp_path,
        model__norm__weight=None,
        lm_head__weight=np.zeros((2, 3), np.float32),
        model__image_newline=np.zeros(4, np.float32),
    )
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    message = str(caught.value)
    assert "1 missing tensor: 'model.norm.weight' [16]" in message
    assert (
        "1 wrong shape: 'lm_head.weight' in model.safetensors is [2, 3], expected [40, 16]"
        in (message)
    )
    assert "1 unknown tensor: 'model.image_newline' [4] in model.safetensors" in message


def test_missing_predictors_are_listed_up_to_five(tmp_path: Path) -> None:
    factory.make_checkpoint(tmp_path, "llava")
    edit_config(tmp_path, sparse_config=factory.SPARSE_CONFIG)
    with pytest.raises(
        CheckpointError,
        match=r"31 missing tensors: 'model\.image_score_predictor\.down_mlp\.0\.weight' \[16\]"
        r".*; and 26 more",
    ):
        read_checkpoint(tmp_path)


def test_predictors_without_their_settings_are_unknown(tmp_path: Path) -> None:
    factory.make_checkpoint(tmp_path)
    edit_config(tmp_path, sparse_config=None, architectures=["LlavaLlamaForCausalLM"])
    with pytest.raises(CheckpointError, match=r"31 unknown tensors: 'model.image_score_pred"):
        read_checkpoint(tmp_path)


def test_missing_tower_tensor_is_named(tmp_path: Path) -> None:
    key = "model__vision_tower__vision_tower__vision_model__post_layernorm__bias"
    rewritten(tmp_path, **{key: None})
    with pytest.raises(CheckpointError, match=rf"'{key.replace('__', '.')}' \[8\]"):
        read_checkpoint(tmp_path)


def test_llava_hf_without_a_tower(tmp_path: Path) -> None:
    values = factory.make_checkpoint(tmp_path, "llava-hf")
    stored = {factory.stored_key(name, "llava-hf"): value for name, value in values.items()}
    factory.write_files(
        tmp_path, {k: v for k, v in stored.items() if not k.startswith("vision_tower.")}
    )
    with pytest.raises(
        CheckpointError, match=r"missing tensors: 'vision_tower.vision_model.embeddings"
    ):
        read_checkpoint(tmp_path)


def test_tensor_stored_under_two_names(tmp_path: Path) -> None:
    key = "model__vision_tower__vision_tower__post_layernorm__bias"
    rewritten(tmp_path, **{key: np.zeros(8, np.float32)})
    with pytest.raises(CheckpointError, match=r"holds 'post_layernorm.bias' twice"):
        read_checkpoint(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    factory.write_json(tmp_path / "config.json", factory.DYNAMIC_CONFIG)
    with pytest.raises(CheckpointError, match=r"has no weights, expected model.safetensors"):
        read_checkpoint(tmp_path)
    factory.write_json(tmp_path / "adapter_config.json", {})
    with pytest.raises(CheckpointError, match="Merge the LoRA adapter"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("files", ["sharded", "sharded bin"])
def test_missing_shard_is_named(tmp_path: Path, files: str) -> None:
    factory.make_checkpoint(tmp_path, files=files)
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names 2 files, 1 of them.*{shard.name}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map, expected key"),
        (
            {"weight_map": {"a": "../b"}},
            r"puts 'a' into '\.\./b', expected the name of a file",
        ),
    ],
)
def test_index_that_is_no_index(tmp_path: Path, index: object, message: str) -> None:
    factory.make_checkpoint(tmp_path, files="sharded")
    factory.write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def _header(value: object, data: bytes = b"") -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(dtype: str, num_bytes: int) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, num_bytes]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "claims 0 bytes, the file has 0 after"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 bytes, the file has 2 after"),
        (struct.pack("<Q", 4) + b"{abc", "its 4 byte header is not JSON"),
        (_header([1]), "its header is a JSON list"),
        (_header({"x": {"dtype": "F32"}}), "header entry of 'x' is .*expected dtype, shape"),
        (
            _header(_entry("F32", 8), b"12345"),
            "'x' ends at byte 8 of the data, the file has 5",
        ),
        (_header(_entry("F32", 6), b"123456"), r"'x' has 6 bytes, F32 \[2\] needs 8"),
        (_header(_entry("F8_E4M3", 2), b"12"), "'x' is F8_E4M3, expected F32, F16, BF16"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    factory.make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def _places(*ranges: tuple[int, int]) -> bytes:
    """A safetensors file with a float32 vector at each range of bytes, 16 bytes of data."""
    entries = {
        f"t{number}": {"dtype": "F32", "shape": [(e - b) // 4], "data_offsets": [b, e]}
        for number, (b, e) in enumerate(ranges)
    }
    return _header(entries, bytes(16))


_TWICE = _places((0, 8), (8, 16)).replace(b'"t1"', b'"t0"')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            _places((0, 12), (8, 16)),
            "'t1' at bytes 8 to 16 overlaps tensor 't0', expected it to start at byte 12",
            id="overlap",
        ),
        pytest.param(_places((0, 16), (4, 8)), "'t1' at .* overlaps tensor 't0'", id="inside"),
        pytest.param(_places((0, 16), (0, 16)), "'t1' at .* overlaps tensor 't0'", id="same"),
        pytest.param(
            _places((12, 16), (0, 8)), "'t0' at .* leaves a hole behind tensor 't1'", id="hole"
        ),
        pytest.param(_places((4, 16)), "hole behind the start of the data", id="hole first"),
        pytest.param(_places((0, 8)), "end at byte 8, the file has 16 bytes", id="hole last"),
        pytest.param(_TWICE, "the key 't0' stands twice in one object", id="key twice"),
    ],
)
def test_tensors_lie_end_to_end_as_safetensors_asks(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(file, "np"):
        pass
    with pytest.raises(CheckpointError, match=message):
        safetensors_sources(file)


def test_order_in_the_header_is_free(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(_places((8, 16), (8, 8), (0, 8)))
    with safetensors.safe_open(file, "np") as opened:
        assert sorted(safetensors_sources(file)) == sorted(opened.keys())


def test_number_of_tensors_is_limited(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    file = tmp_path / "model.safetensors"
    file.write_bytes(_header({str(number): entry for number in range(MAX_TENSORS)}))
    assert len(safetensors_sources(file)) == MAX_TENSORS
    file.write_bytes(_header({str(number): entry for number in range(MAX_TENSORS + 1)}))
    with pytest.raises(CheckpointError, match="lists 100001 tensors, expected at most 100000"):
        safetensors_sources(file)


@pytest.mark.parametrize("files", ["sharded", "sharded bin"])
def test_key_in_two_shards(tmp_path: Path, files: str) -> None:
    factory.make_checkpoint(tmp_path, files=files)
    first, second = sorted(tmp_path.glob("*-of-*"))
    shutil.copyfile(first, second)
    with pytest.raises(CheckpointError, match=f"{second.name} holds .* {first.name} does"):
        read_checkpoint(tmp_path)


def test_safetensors_cut_short(tmp_path: Path) -> None:
    shutil.copytree(DATA / "mha", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated: tensor"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(2), "holds a Tensor, expected a dict of tensors"),
        ({"x": 3}, "'x' is a int, expected a tensor"),
        ({"x": torch.zeros(2, dtype=torch.int8)}, "'x' is torch.int8, expected values of"),
        ({3: torch.zeros(2)}, "has the key 3 of type int, expected names"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "'x' is torch.float32, torch.sparse_coo"),
        ({"x": torch.zeros(2, device="meta")}, "'x' is torch.float32, .* on meta, expected"),
        ({"x": torch.zeros(1).expand(1 << 40)}, "'x' repeats 4 bytes as 4398046511104"),
    ],
)
def test_bin_of_something_else(tmp_path: Path, state: object, message: str) -> None:
    factory.make_checkpoint(tmp_path, files="bin")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"rubbish that is no archive" * 9])
def test_damaged_bin(tmp_path: Path, content: bytes) -> None:
    factory.make_checkpoint(tmp_path, files="bin")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin cannot be mapped"):
        read_checkpoint(tmp_path)


def test_source_that_shrinks_after_the_header_was_read(tmp_path: Path) -> None:
    factory.make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    source = read_checkpoint(tmp_path).tensors["model.norm.weight"]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="ended 64 bytes before the end of tensor"):
        list(source.chunks())


def test_random_weights_are_reproducible(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    factory.write_json(file, {**factory.DYNAMIC_CONFIG, "torch_dtype": "bfloat16"} | TOWER)
    first, second = random_checkpoint(file, 1), random_checkpoint(file, 2)
    assert first.weight_format == BF16
    name = "model.embed_tokens.weight"
    values = first.tensors[name].read()
    assert values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(values, random_checkpoint(file, 1).tensors[name].read())
    np.testing.assert_array_equal(
        values.reshape(-1), np.concatenate(list(first.tensors[name].chunks(max_bytes=100)))
    )
    assert (values != second.tensors[name].read()).any()
    assert 0.015 < values.astype(np.float32).std() < 0.025
    assert (first.tensors["model.norm.weight"].read() == 1).all()
    assert (first.tensors["projector.0.bias"].read() == 0).all()


def test_random_weights_of_a_plain_llama(tmp_path: Path) -> None:
    file = tmp_path / "small.json"
    config = {**factory.TEXT_CONFIG, "model_type": "llama", "tie_word_embeddings": True}
    factory.write_json(file, {**config, "sparse_config": factory.SPARSE_CONFIG, **TOWER})
    checkpoint = random_checkpoint(file, num_decoder_layers=2)
    assert checkpoint.spec.layout == "dynamic-llava"
    assert checkpoint.spec.projector.num_layers == 2
    assert isinstance(checkpoint.tensors["post_layernorm.bias"], RandomSource)
    embeddings = checkpoint.tensors["model.embed_tokens.weight"]
    assert checkpoint.tensors["lm_head.weight"] is embeddings


def test_random_weights_of_an_unknown_type(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    factory.write_json(file, {**factory.ORIGINAL_CONFIG, **TOWER, "torch_dtype": "int8"})
    with pytest.raises(
        CheckpointError, match="torch_dtype is 'int8', expected one of float32"
    ):
        random_checkpoint(file)
