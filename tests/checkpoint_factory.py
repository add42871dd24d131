"""Tiny checkpoints of every layout, and ones of 7B and 13B shapes made of holes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from dllava_export.checkpoints.checkpoint import random_checkpoint
from dllava_export.checkpoints.tensor_source import DTYPE_NAMES

HIDDEN, VISION_HIDDEN, VOCAB = 16, 8, 40

SPARSE_CONFIG = {
    "d_model": 8,
    "dim_feedforward": 16,
    "nhead": 2,
    "num_layers": 1,
    "sparse_layer": 1,
    "vision_keep_rate": 0.5,
    "output_text_keep_rate": 0.5,
    "use_vision_predictor": True,
    "use_text_predictor": True,
    "use_output_text_predictor": True,
    "use_instruct_predictor": False,
    "maskclip": None,  # a dead key of the published checkpoints
}
TEXT_CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # of 8, which ONNX Runtime asks for
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": VISION_HIDDEN,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ORIGINAL_CONFIG = {
    **TEXT_CONFIG,
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "vision_tower",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
}
DYNAMIC_CONFIG = {
    **ORIGINAL_CONFIG,
    "architectures": ["DynamicLlavaLlamaForCausalLM"],
    "sparse_config": SPARSE_CONFIG,
}
HF_CONFIG = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"model_type": "llama", **TEXT_CONFIG},
    "vision_config": VISION_CONFIG,
    "image_token_index": 39,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
CONFIGS = {
    "llava": ORIGINAL_CONFIG,
    "dynamic-llava": DYNAMIC_CONFIG,
    "llava-hf": HF_CONFIG,
    "llava-hf new": HF_CONFIG,
}
SPARSE_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SPARSE_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_TOWER = "vision tower"
_STORED_PREFIXES = {
    "llava": {
        _TOWER: "model.vision_tower.vision_tower.vision_model.",
        "projector.": "model.mm_projector.",
        "image_predictor.": "model.image_score_predictor.",
        "output_text_predictor.": "model.output_text_score_predictor.",
    },
    "llava-hf": {
        _TOWER: "vision_tower.vision_model.",
        "projector.0.": "multi_modal_projector.linear_1.",
        "projector.2.": "multi_modal_projector.linear_2.",
        "model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "llava-hf new": {
        _TOWER: "model.vision_tower.",
        "projector.0.": "model.multi_modal_projector.linear_1.",
        "projector.2.": "model.multi_modal_projector.linear_2.",
        "model.": "model.language_model.",
    },
}
_STORED_PREFIXES["dynamic-llava"] = _STORED_PREFIXES["llava"]
_NOT_TOWER = ("model.", "lm_head.", "projector.", "image_predictor.", "output_text_predictor.")


def stored_key(name: str, layout: str) -> str:
    """Return how a layout spells a canonical name."""
    prefixes = _STORED_PREFIXES[layout]
    if not name.startswith(_NOT_TOWER):
        return prefixes[_TOWER] + name.removeprefix("vision_model.")
    for canonical, stored in prefixes.items():
        if name.startswith(canonical):
            return stored + name.removeprefix(canonical)
    return name


def canonical_values(config: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Return random tensors by canonical name for `config`; the tower is always among them."""
    file = folder / "random.json"
    write_json(file, {**config, "vision_config": VISION_CONFIG})
    sources = random_checkpoint(file).tensors
    file.unlink()
    rng = np.random.default_rng(1)  # norms and biases too shall differ from each other
    return {
        name: (source.read() + rng.normal(0, 0.1, source.shape)).astype(np.float32)
        for name, source in sources.items()
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_weights(path: Path, tensors: Mapping[str, np.ndarray], pad: int = 0) -> None:
    """Write a safetensors file with the header's own format; `pad` shifts the data."""
    names = {dtype: name for name, dtype in DTYPE_NAMES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[key] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    data = b"".join(value.tobytes() for value in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def torch_tensor(value: np.ndarray) -> torch.Tensor:
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.copy())


def make_checkpoint(
    folder: Path,
    layout: str = "dynamic-llava",
    *,
    files: str = "single",
    tower: str = "inside",
    dtype: np.dtype | type = np.float32,
    changes: Mapping[str, Any] | None = None,
    pad: int = 0,
) -> dict[str, np.ndarray]:
    """Write a tiny checkpoint and return its tensors by canonical name.

    Args:
        folder: Where; created.
        layout: A key of `CONFIGS`.
        files: `single`, `sharded`, `bin` or `sharded bin`.
        tower: `inside` the checkpoint (its configuration beside it) or a `folder` of its own.
        dtype: Type of all tensors.
        changes: Keys of config.json to replace; a value of None removes the key.
        pad: Bytes by which safetensors data are shifted out of alignment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIGS[layout], **(changes or {})}
    config = {key: value for key, value in config.items() if value is not None}
    values = {
        name: value.astype(dtype) for name, value in canonical_values(config, folder).items()
    }
    write_json(folder / "config.json", config)
    stored = {stored_key(name, layout): value for name, value in values.items()}
    if "llava-hf" not in layout:
        prefix = _STORED_PREFIXES[layout][_TOWER]
        parts = {k: stored[k] for k in stored if k.startswith(prefix)}
        (folder / "vision_tower").mkdir()
        write_json(folder / "vision_tower" / "config.json", VISION_CONFIG)
        if tower == "folder":
            stored = {key: value for key, value in stored.items() if key not in parts}
            own = {"vision_model." + k.removeprefix(prefix): v for k, v in parts.items()}
            write_weights(folder / "vision_tower" / "model.safetensors", own)
    write_files(folder, stored, files, pad)
    return values


def write_files(
    folder: Path, tensors: Mapping[str, np.ndarray], files: str = "single", pad: int = 0
) -> None:
    """Write the weight files of a folder; `files` as for `make_checkpoint`."""
    stem, suffix = ("pytorch_model", "bin") if "bin" in files else ("model", "safetensors")
    num_shards = 2 if "sharded" in files else 1
    keys = sorted(tensors)
    weight_map = {}
    for index in range(num_shards):
        shard = f"{stem}.{suffix}"
        if num_shards > 1:
            shard = f"{stem}-{index + 1:05}-of-{num_shards:05}.{suffix}"
        part = {key: tensors[key] for key in keys[index::num_shards]}
        weight_map |= dict.fromkeys(part, shard)
        if suffix == "bin":
            torch.save({k: torch_tensor(v) for k, v in part.items()}, folder / shard)
        else:
            write_weights(folder / shard, part, pad)
    if num_shards > 1:
        write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})


def make_sparse_7b(folder: Path, dtype_name: str = "F16", num_layers: int = 32) -> None:
    """Write a checkpoint of 7B shapes in one file; see `make_sparse`."""
    make_sparse(folder, {**SPARSE_7B, "num_hidden_layers": num_layers}, dtype_name)


def make_sparse(
    folder: Path, shapes: Mapping[str, int], dtype_name: str = "F16", num_shards: int = 1
) -> None:
    """Write a checkpoint whose values are holes, zeros without disk space.

    Args:
        folder: Where; created.
        shapes: Keys of config.json: `SPARSE_7B` or `SPARSE_13B`.
        dtype_name: Type of all tensors, as safetensors spells it.
        num_shards: Files, of about the same size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **DYNAMIC_CONFIG,
        **shapes,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "sparse_config": {**SPARSE_CONFIG, "d_model": 512, "nhead": 8, "dim_feedforward": 2048}
        | {"num_layers": 2, "sparse_layer": 2},
    }
    write_json(folder / "config.json", config)
    tensors = random_checkpoint(folder / "config.json").tensors
    itemsize = DTYPE_NAMES[dtype_name].itemsize
    total = itemsize * sum(source.num_values for source in tensors.values())
    headers: list[dict[str, Any]] = [{} for _ in range(num_shards)]
    ends, written, weight_map = [0] * num_shards, 0, {}
    for name, source in tensors.items():
        shard, num_bytes = written * num_shards // total, source.num_values * itemsize
        key = stored_key(name, "dynamic-llava")
        headers[shard][key] = {
            "dtype": dtype_name,
            "shape": list(source.shape),
            "data_offsets": [ends[shard], ends[shard] + num_bytes],
        }
        ends[shard] += num_bytes
        written += num_bytes
        weight_map[key] = shard
    names = ["model.safetensors"]
    if num_shards > 1:
        names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
        index = {"weight_map": {key: names[shard] for key, shard in weight_map.items()}}
        write_json(folder / "model.safetensors.index.json", index)
    for name, header, end in zip(names, headers, ends, strict=True):
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
