"""KVCacheAttention in NumPy, in float64, sample by sample and head by head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

__all__ = ["reference"]


def reference(
    inputs: Mapping[str, np.ndarray], num_heads: int, kv_num_heads: int, scale: float
) -> dict[str, np.ndarray]:
    """Return `output`, `present_key` and `present_value`; inputs as in the descriptor.

    Rows from `row_lengths` on are padding: their output is 0. Rows behind the last cache row are
    not stored.
    """
    query, present = inputs["query"], [inputs["past_key"].copy(), inputs["past_value"].copy()]
    rows = query.shape[1]
    capacity = present[0].shape[2]
    output = np.zeros(query.shape, np.float64)
    for b, start in enumerate(inputs["write_index"]):
        heads = [_heads(inputs[n][b], kv_num_heads) for n in ("key", "value")]
        for cache, new in zip(present, heads, strict=True):
            cache[b, :, start : start + rows] = new[:, : capacity - start]
        queries = _heads(query[b], num_heads).astype(np.float64)
        for h in range(num_heads):
            kv_head = h // (num_heads // kv_num_heads)
            keys, values = (
                np.concatenate([cache[b, kv_head, :start], new[kv_head]]).astype(np.float64)
                for cache, new in zip(present, heads, strict=True)
            )
            for i in range(min(rows, inputs["row_lengths"][b])):
                scores = scale * keys[: start + i + 1] @ queries[h, i]
                weights = np.exp(scores - scores.max())
                at = slice(h * keys.shape[1], (h + 1) * keys.shape[1])
                output[b, i, at] = weights / weights.sum() @ values[: start + i + 1]
    results = [output.astype(query.dtype), *present]
    return dict(zip(("output", "present_key", "present_value"), results, strict=True))


def _heads(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Split [rows, num_heads * head_dim] into [num_heads, rows, head_dim]."""
    return rows.reshape(len(rows), num_heads, -1).swapaxes(0, 1)
