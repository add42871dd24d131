"""The model before training: sizes, tokenizer, and a checkpoint folder in LLaVA's layout."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from mosaic_data import PATCH_SIZE, PATCHES_PER_SIDE, PICTURE_SIZE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["make_tokenizer", "write_untrained"]

VISION_CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": PICTURE_SIZE,
    "patch_size": PATCH_SIZE,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 128,
}
CONFIG: dict[str, Any] = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "mm_vision_tower": "vision_tower",
    "mm_hidden_size": VISION_CONFIG["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "vision_config": VISION_CONFIG,
    "torch_dtype": "float32",
}
_SPECIAL = ("<unk>", "<s>", "</s>")
_WORDS = (
    "A The a an and answers artificial assistant at between bottom center chat curious describe "
    "Describe detailed digit digits empty every gives has helpful holds How how in in "
    "intelligence is its largest left many middle none of order place polite questions reading "
    "right s sum the There there to top total user What Which which with are USER ASSISTANT s "
    ". , ? : ' + ="
).split()
_MAX_SUM = 54
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"],
}
# So that the empty ground, most of a picture, is near 0.
_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": PICTURE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": PICTURE_SIZE, "width": PICTURE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.1, 0.1, 0.1],
    "image_std": [0.25, 0.25, 0.25],
}
_EMBEDDING_STD = 0.3
_RESIDUAL_FACTOR = 0.3  # of patches, and of matrices that add to the residual stream


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer of whole words, numbers from 0 to 54 among them."""
    words = [*_SPECIAL, *dict.fromkeys(_WORDS), *map(str, range(_MAX_SUM + 1))]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Joins words with spaces, and takes away those before punctuation.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def write_untrained(folder: Path, seed: int) -> None:
    """Write a checkpoint with random weights, in LLaVA's layout."""
    from dllava_export.checkpoints.checkpoint import random_checkpoint
    from dllava_export.training.model import build_model
    from dllava_export.training.output import write_checkpoint
    from dllava_export.training.settings import TrainingSettings

    settings = TrainingSettings(train_predictors=False, freeze_tower=False)
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as plan:
        _write_json(Path(plan, "config.json"), CONFIG)
        _write_json(Path(plan, "tokenizer_config.json"), _TOKENIZER_CONFIG)
        _write_json(Path(plan, "preprocessor_config.json"), _PREPROCESSOR)
        make_tokenizer().save(str(Path(plan, "tokenizer.json")))
        checkpoint = random_checkpoint(Path(plan, "config.json"), seed)
        model = build_model(checkpoint, None, settings, torch.device("cpu"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _init(name, parameter, generator)
            model.tower.embeddings.position_embedding.weight[1:] = _waves()
        write_checkpoint(folder, model, checkpoint, None, settings)


def _init(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Draw a matrix so that it keeps the size of what goes through it."""
    if "norm" in name:
        parameter.fill_(float(name.endswith("weight")))
    elif parameter.ndim == 1 and name.endswith("bias"):
        parameter.zero_()
    elif "embed" in name and "patch" not in name:
        parameter.normal_(std=_EMBEDDING_STD, generator=generator)
    else:
        parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    if name.endswith(
        (
            "patch_embedding.weight",
            "o_proj.weight",
            "down_proj.weight",
            "out_proj.weight",
            "fc2.weight",
        )
    ):
        parameter.mul_(_RESIDUAL_FACTOR)


def _waves() -> torch.Tensor:
    """Return position embeddings to start from, [576, vision_hidden]: waves along both axes.

    Neighbours are then in the same relation everywhere, which the tower learns much sooner.
    """
    num_waves = VISION_CONFIG["hidden_size"] // 4
    position = torch.arange(PATCHES_PER_SIDE)[:, None]
    angle = position * 10 ** -torch.linspace(0, 1.5, num_waves)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # [24, vision_hidden / 2]
    rows = line[:, None].expand(-1, PATCHES_PER_SIDE, -1)
    waves = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
    return 0.5 * waves


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
