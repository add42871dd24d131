"""Every tensor, domain and file name that two modules must agree on, with shape and dtype.

Dimensions: batch, rows (fed in this run), num_kept (rows that go on from `sparse_layer`),
capacity_full and capacity_sparse (cache rows per cache group), hidden_size, vocab_size.
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

# Decoder outputs.
LOGITS = "logits"  # [batch, vocab_size] float, last valid row of each sample
KEPT_INDICES = "kept_indices"  # [batch, num_kept] int64, ascending rows of inputs_embeds
KEEP = "keep"  # [batch] bool, the policy's keep bit; true for prompt rows
NUM_ROWS = "num_rows"  # [batch] int64, rows left after all selections (recompute)

# Visual graph.
PIXEL_VALUES = "pixel_values"  # [num_images, 3, image_size, image_size] float
IMAGE_FEATURES = "image_features"  # [num_images, num_image_tokens, hidden_size] float

# What stands for an image in a prompt: in text, and in token ids, where no vocabulary has it.
IMAGE_PLACEHOLDER = "<image>"
IMAGE_PLACEHOLDER_ID = -200

# Tensors of a checkpoint that are referred to by name; see `families.family`.
TOKEN_EMBEDDING = "model.embed_tokens.weight"  # [vocab_size, hidden_size]
LM_HEAD = "lm_head.weight"  # [vocab_size, hidden_size]; may be TOKEN_EMBEDDING itself

# Symbolic dimensions.
BATCH, ROWS, NUM_KEPT_DIM = "batch", "rows", "num_kept"

# Cache groups: decoder layers whose caches store the same rows share a write index and a
# capacity. `backends.cache_groups` says which layers a group has.
GROUPS = FULL, SPARSE = "full", "sparse"
"""Layers below `sparse_layer`, which store every row, and layers from it on."""

_PAST, _PRESENT = "past_key_values.", "present."
_CAPACITY = "capacity_"


def write_index(group: str) -> str:
    """Decoder input: [batch] int64, the next free cache row of a group."""
    return f"write_index_{group}"


def next_write_index(group: str) -> str:
    """Decoder output: [batch] int64, where the group goes on."""
    return f"next_write_index_{group}"


def capacity(group: str) -> str:
    """Symbolic dimension: cache rows per sample of a group, the spare row included."""
    return f"{_CAPACITY}{group}"


def group_of(capacity_dim: object) -> str:
    """Return the group whose `capacity` a cache's symbolic dimension is."""
    return str(capacity_dim).removeprefix(_CAPACITY)


def past(layer: int, part: str) -> str:
    """Cache input of a layer: [batch, num_kv_heads, capacity, head_dim]; part is key or value."""
    return f"{_PAST}{layer}.{part}"


def present(layer: int, part: str) -> str:
    """Cache output of a layer: the same buffer as `past`, updated in place."""
    return f"{_PRESENT}{layer}.{part}"


def is_past(name: str) -> bool:
    """Return whether an input is a cache."""
    return name.startswith(_PAST)


def present_of(past_name: str) -> str:
    """Return the output that shares the buffer of a cache input."""
    return _PRESENT + past_name.removeprefix(_PAST)
