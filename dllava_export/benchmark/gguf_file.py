"""Write the random decoder as a GGUF file, as llama.cpp's own converter lays out LLaMA."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

from dllava_export.benchmark.random_model import RandomModel

__all__ = ["write_gguf"]

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: RandomModel, path: Path) -> None:
    """Write the decoder in float32, without a vocabulary."""
    geometry, config = model.geometry, model.geometry.llama_config()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(geometry.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(geometry.hidden_size)
    writer.add_block_count(geometry.num_layers)
    writer.add_feed_forward_length(geometry.intermediate_size)
    writer.add_head_count(geometry.num_heads)
    writer.add_head_count_kv(geometry.num_kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(geometry.hidden_size // geometry.num_heads)
    writer.add_vocab_size(geometry.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    heads = {"q_proj": geometry.num_heads, "k_proj": geometry.num_kv_heads}
    with safe_open(model.weights, framework="np") as file:
        for key in file.keys():
            values = file.get_tensor(key)
            num_heads = heads.get(key.split(".")[-2])
            if num_heads is not None:
                values = _interleave(values, num_heads)
            writer.add_tensor(_gguf_name(key), values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def _gguf_name(key: str) -> str:
    if key in _NAMES:
        return _NAMES[key]
    _, _, layer, rest = key.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _interleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows of a projection: llama.cpp rotates neighbours, transformers the two halves.

    Args:
        values: [num_heads * head_dim, hidden_size].
        num_heads: Of this projection.
    """
    halves = values.reshape(num_heads, 2, -1, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
