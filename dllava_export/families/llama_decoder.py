"""LLaMA decoders: their configuration and the module that is traced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dllava_export import names
from dllava_export.errors import CheckpointError, SettingError, UnsupportedModelError
from dllava_export.families.config_file import check_kinds, check_sizes, transformers_config
from dllava_export.families.config_kinds import LLAMA_KINDS
from dllava_export.families.family import Traceable

__all__ = [
    "LLAMA_KEYS",
    "REQUIRED_LLAMA_KEYS",
    "LlamaDecoder",
    "llama_config",
    "traceable_llama",
]

LLAMA_KEYS = tuple(LLAMA_KINDS)

REQUIRED_LLAMA_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)

# Frequencies that do not depend on the length of the input.
_ROPE_TYPES = ("default", "linear", "llama3")


class LlamaDecoder(torch.nn.Module):
    """The layers one after another; causal by construction, so that no mask is traced."""

    def __init__(self, language_model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = language_model.model
        self.lm_head = language_model.lm_head

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, rows, vocab_size].

        Args:
            inputs_embeds: [batch, rows, hidden_size].
            position_ids: [batch, rows] int64.
        """
        rotary = self.model.rotary_emb(inputs_embeds, position_ids)
        hidden = inputs_embeds
        for layer in self.model.layers:
            hidden = layer(hidden, position_embeddings=rotary)
        return self.lm_head(self.model.norm(hidden))


def llama_config(
    values: Mapping[str, Any], num_decoder_layers: int | None = None
) -> LlamaConfig:
    """Return a decoder's configuration.

    Args:
        values: Keys of a LLaMA configuration; others are left out.
        num_decoder_layers: Keep only the first so many layers.

    Raises:
        UnsupportedModelError: If the decoder is not a plain LLaMA.
        CheckpointError: If sizes are missing or impossible.
        SettingError: If `num_decoder_layers` is not in 1..num_hidden_layers.
    """
    check_kinds(values, LLAMA_KINDS, "The text configuration")
    known = {key: values[key] for key in LLAMA_KEYS if key in values}
    result = transformers_config(LlamaConfig, "text configuration", known)
    sizes = (*REQUIRED_LLAMA_KEYS, "head_dim", "max_position_embeddings")
    check_sizes("The text configuration", result, sizes)
    _check_decoder(result)
    num_layers = result.num_hidden_layers
    if num_decoder_layers is not None:
        if not 1 <= num_decoder_layers <= num_layers:
            raise SettingError(
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


def traceable_llama(config: LlamaConfig) -> Traceable:
    """Return the decoder: `inputs_embeds`, `position_ids` → `logits`; see `ModelSpec`."""
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        decoder = LlamaDecoder(LlamaForCausalLM(config))
        example = (torch.zeros(2, 7, config.hidden_size), torch.zeros(2, 7, dtype=torch.long))
    rows = {0: names.BATCH, 1: names.ROWS}
    inv_freq = LlamaRotaryEmbedding(config).inv_freq.float()  # [head_dim / 2]
    return Traceable(
        decoder,
        example,
        inputs={names.INPUTS_EMBEDS: rows, names.POSITION_IDS: rows},
        outputs=(names.LOGITS,),
        buffers={"model.rotary_emb.inv_freq": inv_freq},
    )
