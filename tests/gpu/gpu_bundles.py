"""The bundles that the GPU script works on: golden checkpoints, and a larger random one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from checkpoint_factory import DYNAMIC_CONFIG, SPARSE_CONFIG, VISION_CONFIG
from golden import CASES, DATA, RECOMPUTE_STEPS, load_case
from gpu_comparison import Prompt

from dllava_export.bundles.manifest import read_manifest
from dllava_export.checkpoints.checkpoint import random_checkpoint, read_checkpoint
from dllava_export.exporting.exporter import export_checkpoint
from dllava_export.exporting.options import SparsityOptions
from dllava_export.exporting.sparsifier import sparsify_decoder

__all__ = [
    "LARGE_CONFIG",
    "dense_form",
    "golden_bundle",
    "golden_prompts",
    "large_bundle",
    "random_prompt",
]

NUM_TEXT, NUM_STEPS = 24, 32

LARGE_CONFIG = {
    **DYNAMIC_CONFIG,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "vision_config": {**VISION_CONFIG, "image_size": 336},  # 576 image tokens
    "sparse_config": {
        **SPARSE_CONFIG,
        "d_model": 256,
        "nhead": 8,
        "dim_feedforward": 512,
        "num_layers": 2,
        "sparse_layer": 2,
        "vision_keep_rate": 0.2,
    },
}


def golden_bundle(folder: Path, checkpoint: str, precision: str) -> Path:
    """Export a golden checkpoint, unless it was."""
    out = folder / f"{checkpoint}_{precision}"
    if not out.exists():
        export_checkpoint(read_checkpoint(DATA / checkpoint), out, precision=precision)
    return out


def golden_prompts(checkpoint: str) -> dict[str, Prompt]:
    """Return the golden cases of a checkpoint, by name."""
    cases = {name: load_case(name) for name, owner in CASES.items() if owner == checkpoint}
    return {
        name: Prompt(
            case.input_ids, {"pixel_values": case.images}, case.tokens, RECOMPUTE_STEPS
        )
        for name, case in cases.items()
    }


def large_bundle(folder: Path) -> Path:
    """Export random weights at a width where a GPU has something to do, unless it was done."""
    out = folder / "large_fp16"
    if not out.exists():
        config = folder / "large_config.json"
        config.write_text(json.dumps(LARGE_CONFIG), encoding="utf-8")
        export_checkpoint(random_checkpoint(config), out, precision="fp16")
    return out


def dense_form(folder: Path, out: Path) -> Path:
    """Return the bundle without any pruning, made at `out` unless it is there."""
    if not out.exists():
        sparsify_decoder(folder, out, SparsityOptions(policy="none"))
    return out


def random_prompt(folder: Path, batch: int = 1, num_steps: int = NUM_STEPS) -> Prompt:
    """Return a prompt with image features and tokens of a fixed seed."""
    manifest = read_manifest(folder, verify=False)
    geometry = manifest.geometry
    rng = np.random.default_rng(0)
    text = rng.integers(3, geometry.vocab_size, (batch, NUM_TEXT))
    text[:, 1] = -200
    features = rng.normal(
        0, 0.02, (batch, geometry.num_image_tokens, geometry.hidden_size)
    ).astype(np.float32)
    tokens = rng.integers(3, geometry.vocab_size, (num_steps, batch))
    return Prompt(text, {"image_features": features}, tokens, (1, min(8, num_steps)))
