"""Names and shapes of a model's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllava_export.families.clip_tower import ProjectorConfig
from dllava_export.geometry import PredictorConfig

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlamaConfig

__all__ = ["Shape", "Shapes", "tower_shapes"]


Shape = tuple[int, ...]


Shapes = dict[str, Shape]


def _linear(name: str, num_out: int, num_in: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (num_out, num_in)}
    if bias:
        shapes[f"{name}.bias"] = (num_out,)
    return shapes


def _layer_norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _decoder_shapes(config: LlamaConfig) -> Shapes:
    hidden, mlp = config.hidden_size, config.intermediate_size
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    num_q = config.num_attention_heads * config.head_dim
    num_kv = config.num_key_value_heads * config.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        bias = config.attention_bias
        shapes |= _linear(f"{layer}.self_attn.q_proj", num_q, hidden, bias)
        shapes |= _linear(f"{layer}.self_attn.k_proj", num_kv, hidden, bias)
        shapes |= _linear(f"{layer}.self_attn.v_proj", num_kv, hidden, bias)
        shapes |= _linear(f"{layer}.self_attn.o_proj", hidden, num_q, bias)
        shapes |= _linear(f"{layer}.mlp.gate_proj", mlp, hidden, config.mlp_bias)
        shapes |= _linear(f"{layer}.mlp.up_proj", mlp, hidden, config.mlp_bias)
        shapes |= _linear(f"{layer}.mlp.down_proj", hidden, mlp, config.mlp_bias)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _projector_shapes(config: ProjectorConfig) -> Shapes:
    shapes: Shapes = {}
    num_in = config.in_features
    for index in range(config.num_layers):
        shapes |= _linear(f"projector.{2 * index}", config.out_features, num_in, config.bias)
        num_in = config.out_features
    return shapes


def _predictor_shapes(config: PredictorConfig, hidden: int) -> Shapes:
    width = config.d_model
    shapes: Shapes = {}
    if config.use_vision_predictor:
        name = "image_predictor"
        shapes |= _layer_norm(f"{name}.down_mlp.0", hidden)
        shapes |= _linear(f"{name}.down_mlp.1", width, hidden)
        mlp = int(width * (config.dim_feedforward / width))  # in floats, as upstream has it
        for index in range(config.num_layers):
            block = f"{name}.transformer.{index}"
            shapes |= _layer_norm(f"{block}.norm1", width)
            shapes |= _linear(f"{block}.attn.qkv", 3 * width, width, bias=False)
            shapes |= _linear(f"{block}.attn.proj", width, width)
            shapes |= _layer_norm(f"{block}.norm2", width)
            shapes |= _linear(f"{block}.mlp.fc1", mlp, width)
            shapes |= _linear(f"{block}.mlp.fc2", width, mlp)
        shapes |= _linear(f"{name}.output_mlp.0", width // 2, width)
        shapes |= _linear(f"{name}.output_mlp.2", width // 4, width // 2)
        shapes |= _linear(f"{name}.output_mlp.4", 2, width // 4)
    if config.has_output_text:
        name = "output_text_predictor.output_mlp"
        shapes |= _layer_norm(f"{name}.0", hidden)
        shapes |= _linear(f"{name}.1", width, hidden)
        shapes |= _linear(f"{name}.3", width // 2, width)
        shapes |= _linear(f"{name}.5", width // 4, width // 2)
        shapes |= _linear(f"{name}.7", 2, width // 4)
    return shapes


def tower_shapes(config: CLIPVisionConfig) -> Shapes:
    """Return name → shape of the parameters of transformers' `CLIPVisionModel`.

    The model itself is asked, without memory for values: names differ between versions.
    """
    import torch
    from transformers import CLIPVisionModel

    with torch.device("meta"):
        state = CLIPVisionModel(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
