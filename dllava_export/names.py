"""Every tensor, domain and file name that two modules must agree on, with shape and dtype.

Dimensions: batch, rows (fed in this run), num_kept (rows that go on from `sparse_layer`),
capacity_full and capacity_sparse (cache rows per layer group), hidden_size, vocab_size.
"""

from __future__ import annotations

OPSET = 24
IR_VERSION = 11
"""ONNX IR version written to every model: the first one that carries opset 24 everywhere."""

DOMAIN = "ai.dllava"
"""Domain of the sparsification ops, each a model-local function with a standard ONNX body."""
DOMAIN_VERSION = 1
PLUGIN_NAMESPACE = "dllava"
PLUGIN_VERSION = "1"

# Row kinds, values of `token_kind`.
PADDING, PROMPT_TEXT, IMAGE, GENERATED_TEXT = 0, 1, 2, 3

# Decoder inputs.
INPUTS_EMBEDS = "inputs_embeds"  # [batch, rows, hidden_size] float
POSITION_IDS = "position_ids"  # [batch, rows] int64, original positions, never renumbered
TOKEN_KIND = "token_kind"  # [batch, rows] int64, one of the row kinds above
NUM_KEPT = "num_kept"  # [1] int64, the largest of kept_lengths; 1 in decode
KEPT_LENGTHS = (
    "kept_lengths"  # [batch] int64, rows of each sample that go on, padding excluded
)
NUM_IMAGE_ROWS = "num_image_rows"  # [1] int64, image rows per sample that has any; 0 in decode
WRITE_INDEX_FULL = "write_index_full"  # [batch] int64, next free cache row below sparse_layer
WRITE_INDEX_SPARSE = "write_index_sparse"  # [batch] int64, the same from sparse_layer on

# Decoder outputs.
LOGITS = "logits"  # [batch, vocab_size] float, last valid row of each sample
KEPT_INDICES = "kept_indices"  # [batch, num_kept] int64, ascending rows of inputs_embeds
KEEP = "keep"  # [batch] bool, the policy's keep bit; true for prompt rows
NUM_ROWS = "num_rows"  # [batch] int64, rows left after all selections (recompute)
NEXT_WRITE_INDEX_FULL = "next_write_index_full"  # [batch] int64
NEXT_WRITE_INDEX_SPARSE = "next_write_index_sparse"  # [batch] int64

# Visual graph.
PIXEL_VALUES = "pixel_values"  # [num_images, 3, image_size, image_size] float
IMAGE_FEATURES = "image_features"  # [num_images, num_image_tokens, hidden_size] float

# Symbolic dimensions.
BATCH, ROWS, NUM_KEPT_DIM = "batch", "rows", "num_kept"
CAPACITY_FULL, CAPACITY_SPARSE = "capacity_full", "capacity_sparse"


def past(layer: int, part: str) -> str:
    """Cache input of a layer: [batch, num_kv_heads, capacity, head_dim]; part is key or value."""
    return f"past_key_values.{layer}.{part}"


def present(layer: int, part: str) -> str:
    """Cache output of a layer: the same buffer as `past`, updated in place."""
    return f"present.{layer}.{part}"


# Tensors of a checkpoint that are referred to by name; see `families.family`.
TOKEN_EMBEDDING = "model.embed_tokens.weight"  # [vocab_size, hidden_size]
LM_HEAD = "lm_head.weight"  # [vocab_size, hidden_size]; may be TOKEN_EMBEDDING itself

# Where an image stands in a prompt, as LLaVA has it.
IMAGE_PLACEHOLDER = "<image>"
IMAGE_PLACEHOLDER_ID = -200
"""In token ids, whatever the tokenizer says; also where a vocabulary has no image token."""
