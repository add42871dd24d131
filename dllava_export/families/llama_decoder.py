"""LLaMA decoders: their configuration and the module that is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dllava_export.errors import CheckpointError, UnsupportedModelError
from dllava_export.families.config_file import _check_sizes, _transformers_config
from dllava_export.families.llava import Layout

if TYPE_CHECKING:
    from transformers import LlamaConfig

__all__ = ["LLAMA_KEYS", "text_config"]


LLAMA_KEYS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)


_REQUIRED_LLAMA_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


# Frequencies that do not depend on the length of the input.
_ROPE_TYPES = ("default", "linear", "llama3")


def text_config(
    config: Mapping[str, Any], layout: Layout, num_decoder_layers: int | None = None
) -> LlamaConfig:
    """Return the decoder's configuration.

    Args:
        config: The parsed `config.json`.
        layout: From `detect_layout`.
        num_decoder_layers: Keep only the first so many layers.

    Raises:
        UnsupportedModelError: If the decoder is not a plain LLaMA.
        CheckpointError: If sizes are missing or impossible.
        ValueError: If `num_decoder_layers` is not in 1..num_hidden_layers.
    """
    from transformers import LlamaConfig

    values: Mapping[str, Any] = config
    if layout == "llava-hf":
        values = config.get("text_config") or {}
        model_type = values.get("model_type", "llama")
        if model_type != "llama":
            raise UnsupportedModelError(
                f"The text model is of type {model_type!r}, expected 'llama'. "
                "Use a LLaVA-1.5 checkpoint with a LLaMA or Vicuna decoder."
            )
    else:
        missing = [key for key in _REQUIRED_LLAMA_KEYS if key not in values]
        if missing:
            raise CheckpointError(
                f"config.json lacks {', '.join(missing)}, expected the sizes of the decoder. "
                "Restore config.json from the original checkpoint."
            )
    known = {key: values[key] for key in LLAMA_KEYS if key in values}
    if config.get("tie_word_embeddings"):
        known["tie_word_embeddings"] = True
    result = _transformers_config(LlamaConfig, "text configuration", known)
    _check_sizes("The text configuration", result, (*_REQUIRED_LLAMA_KEYS, "head_dim"))
    _check_decoder(result)
    num_layers = result.num_hidden_layers
    if num_decoder_layers is not None:
        if not 1 <= num_decoder_layers <= num_layers:
            raise ValueError(
                f"num_decoder_layers must be in 1..{num_layers}, got {num_decoder_layers}."
            )
        result.num_hidden_layers = num_decoder_layers
    return result


def _check_decoder(config: LlamaConfig) -> None:
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"The decoder has hidden_act {config.hidden_act!r}, expected 'silu'. "
            "Use a LLaVA-1.5 checkpoint with a LLaMA or Vicuna decoder."
        )
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"The decoder's rotary embedding has rope_type {rope_type!r}, expected one of "
            f"{', '.join(_ROPE_TYPES)}. Use a checkpoint with fixed frequencies."
        )
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if not num_kv_heads or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise CheckpointError(
            f"The text configuration has num_key_value_heads {num_kv_heads}, expected a "
            f"divisor of num_attention_heads ({num_heads}). Restore config.json."
        )
