"""What values of configuration files may be; `config_file.check_kinds` reads these tables.

Path of a key → kinds, in the words of messages. Only keys that this package reads are listed.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "ADAPTER_KINDS",
    "CLIP_KINDS",
    "CONFIG_KINDS",
    "DECODER_KINDS",
    "FLAG",
    "GENERATION_KINDS",
    "LIST",
    "LLAMA_KINDS",
    "LLAVA_KINDS",
    "NUMBER",
    "NUMBERS",
    "OBJECT",
    "PREPROCESSOR_KINDS",
    "SPARSE_KINDS",
    "TEXT",
    "TEXTS",
    "TOKENIZER_KINDS",
    "WHOLE",
    "WHOLES",
    "Kinds",
    "below",
]

TEXT = "a text"
FLAG = "true or false"
WHOLE = "a whole number"
NUMBER = "a number"
OBJECT = "an object"
LIST = "a list"
TEXTS = "a list of texts"
NUMBERS = "a list of numbers"
WHOLES = "a list of whole numbers"

Kinds = Mapping[str, tuple[str, ...]]


def below(key: str, kinds: Kinds) -> dict[str, tuple[str, ...]]:
    """Return the table of an object that lies inside another one."""
    return {key: (OBJECT,), **{f"{key}.{path}": allowed for path, allowed in kinds.items()}}


# Of any checkpoint's config.json: what tells the family, and the type of random weights.
CONFIG_KINDS: Kinds = {
    "model_type": (TEXT,),
    "architectures": (TEXTS,),
    "torch_dtype": (TEXT,),
    "dtype": (TEXT,),
}

LLAMA_KINDS: Kinds = {
    "attention_bias": (FLAG,),
    "bos_token_id": (WHOLE,),
    "eos_token_id": (WHOLE, WHOLES),
    "head_dim": (WHOLE,),
    "hidden_act": (TEXT,),
    "hidden_size": (WHOLE,),
    "initializer_range": (NUMBER,),
    "intermediate_size": (WHOLE,),
    "max_position_embeddings": (WHOLE,),
    "mlp_bias": (FLAG,),
    "num_attention_heads": (WHOLE,),
    "num_hidden_layers": (WHOLE,),
    "num_key_value_heads": (WHOLE,),
    "pad_token_id": (WHOLE,),
    "rms_norm_eps": (NUMBER,),
    "rope_parameters": (OBJECT,),
    "rope_scaling": (OBJECT,),
    "rope_theta": (NUMBER,),
    "tie_word_embeddings": (FLAG,),
    "vocab_size": (WHOLE,),
}
_ROPE_KINDS: Kinds = {
    "rope_type": (TEXT,),
    "type": (TEXT,),
    "rope_theta": (NUMBER,),
    "factor": (NUMBER,),
    "low_freq_factor": (NUMBER,),
    "high_freq_factor": (NUMBER,),
    "original_max_position_embeddings": (WHOLE,),
}
_TEXT_KINDS: Kinds = {
    "model_type": (TEXT,),
    **LLAMA_KINDS,
    **below("rope_parameters", _ROPE_KINDS),
    **below("rope_scaling", _ROPE_KINDS),
}

CLIP_KINDS: Kinds = {
    "hidden_act": (TEXT,),
    "hidden_size": (WHOLE,),
    "image_size": (WHOLE,),
    "intermediate_size": (WHOLE,),
    "layer_norm_eps": (NUMBER,),
    "num_attention_heads": (WHOLE,),
    "num_channels": (WHOLE,),
    "num_hidden_layers": (WHOLE,),
    "patch_size": (WHOLE,),
    "projection_dim": (WHOLE,),
}

SPARSE_KINDS: Kinds = {
    "d_model": (WHOLE,),
    "nhead": (WHOLE,),
    "dim_feedforward": (WHOLE,),
    "num_layers": (WHOLE,),
    "sparse_layer": (WHOLE,),
    "vision_keep_rate": (NUMBER,),
    "output_text_keep_rate": (NUMBER,),
    "use_vision_predictor": (FLAG,),
    "use_text_predictor": (FLAG,),
    "use_output_text_predictor": (FLAG,),
    "use_instruct_predictor": (FLAG,),
}

LLAVA_KINDS: Kinds = {
    **_TEXT_KINDS,
    **below("text_config", _TEXT_KINDS),
    **below("vision_config", {"model_type": (TEXT,), **CLIP_KINDS}),
    **below("sparse_config", SPARSE_KINDS),
    "image_aspect_ratio": (TEXT,),
    "image_token_id": (WHOLE,),
    "image_token_index": (WHOLE,),
    "mm_patch_merge_type": (TEXT,),
    "mm_projector_type": (TEXT,),
    "mm_use_im_start_end": (FLAG,),
    "mm_vision_select_feature": (TEXT,),
    "mm_vision_select_layer": (WHOLE, WHOLES),
    "mm_vision_tower": (TEXT,),
    "multimodal_projector_bias": (FLAG,),
    "projector_hidden_act": (TEXT,),
    "s2": (FLAG,),
    "s2_scales": (TEXT,),
    "vision_feature_layer": (WHOLE, WHOLES),
    "vision_feature_select_strategy": (TEXT,),
    "vision_tower": (TEXT,),
}

# Beside another exporter's decoder: config.json and generation_config.json.
DECODER_KINDS: Kinds = {
    "eos_token_id": (WHOLE, WHOLES),
    "max_position_embeddings": (WHOLE,),
    **below("text_config", {"eos_token_id": (WHOLE, WHOLES)}),
    "text_config.max_position_embeddings": (WHOLE,),
    **below("sparse_config", SPARSE_KINDS),
}

GENERATION_KINDS: Kinds = {"eos_token_id": (WHOLE, WHOLES)}

TOKENIZER_KINDS: Kinds = {"add_bos_token": (FLAG,), "chat_template": (TEXT, LIST, OBJECT)}

_EDGES: Kinds = {
    "shortest_edge": (WHOLE,),
    "height": (WHOLE,),
    "width": (WHOLE,),
}
PREPROCESSOR_KINDS: Kinds = {
    **{
        flag: (FLAG,)
        for flag in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
    },
    **below("size", _EDGES),
    "size": (OBJECT, WHOLE),
    **below("crop_size", _EDGES),
    "crop_size": (OBJECT, WHOLE),
    "resample": (WHOLE,),
    "rescale_factor": (NUMBER,),
    "image_mean": (NUMBERS, NUMBER),
    "image_std": (NUMBERS, NUMBER),
}

# adapter_config.json of PEFT.
ADAPTER_KINDS: Kinds = {"base_model_name_or_path": (TEXT,), "peft_type": (TEXT,)}
