"""Names of what a run of a conversation gives: `stage/quantity` or `stage/layers.i/quantity`.

    visual/image_features          [num_image_tokens, hidden_size]
    prefill/kept_indices           [num_kept] int64: prompt rows that go on, ascending
    prefill/image_scores           [num_image_tokens] float32: what images were selected by
    prefill/logits                 [vocab_size]
    prefill/cache_lengths          [layers] int64; decode.t too
    decode.t/keep                  bool: the decision about token t
    decode.t/forced                bool: it was kept, but the caches were full
    decode.t/keep_margin           float32: how far it was from the other decision
    decode.t/logits                [vocab_size]
    recompute/logits               [vocab_size]
    recompute/num_rows             int64: rows behind all selections
    recompute/kept_rows            [num_rows] int64: which ones, ascending
    STAGE/layers.i/hidden_states   [rows, hidden_size]: what layer i puts out
    prefill/layers.i/key, value    [rows, num_kv_heads * head_dim]: what it cached
    cache/layers.i/key, value      the same, after the last decode step

Scores, margins, kept rows and what belongs to layers are there only where a run can tell.
Rows stand in the order of their positions, first to last.
"""

from __future__ import annotations

__all__ = [
    "CACHE",
    "CACHE_LENGTHS",
    "FORCED",
    "HIDDEN_STATES",
    "IMAGE_FEATURES",
    "IMAGE_SCORES",
    "KEEP",
    "KEEP_MARGIN",
    "KEPT_INDICES",
    "KEPT_ROWS",
    "LAYER_QUANTITIES",
    "LOGITS",
    "NUM_ROWS",
    "PREFILL",
    "RECOMPUTE",
    "VISUAL",
    "decode",
    "layer",
    "output",
]

VISUAL, PREFILL, CACHE, RECOMPUTE = "visual", "prefill", "cache", "recompute"

IMAGE_FEATURES, LOGITS, CACHE_LENGTHS = "image_features", "logits", "cache_lengths"
KEPT_INDICES, IMAGE_SCORES = "kept_indices", "image_scores"
KEEP, KEEP_MARGIN, FORCED = "keep", "keep_margin", "forced"
NUM_ROWS, KEPT_ROWS, HIDDEN_STATES = "num_rows", "kept_rows", "hidden_states"

LAYER_QUANTITIES = ("key", "value", HIDDEN_STATES)
"""In the order in which a layer computes them."""


def decode(step: int) -> str:
    """Return the stage of a decode step, 0-based."""
    return f"decode.{step}"


def output(stage: str, quantity: str) -> str:
    """Return the name of one output."""
    return f"{stage}/{quantity}"


def layer(stage: str, index: int, quantity: str) -> str:
    """Return the name of one layer's output."""
    return f"{stage}/layers.{index}/{quantity}"
