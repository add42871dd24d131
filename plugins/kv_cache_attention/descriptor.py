"""KVCacheAttention: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from dllava_export.plugins.descriptor import FLOATS, Descriptor, Dim, Shape, TensorSpec

__all__ = ["DESCRIPTOR"]


def _output_shapes(shapes: Mapping[str, Shape]) -> dict[str, tuple[Dim, ...]]:
    return {
        "output": tuple(shapes["query"]),
        "present_key": tuple(shapes["past_key"]),
        "present_value": tuple(shapes["past_value"]),
    }


DESCRIPTOR = Descriptor(
    op="KVCacheAttention",
    inputs=(
        TensorSpec("query", FLOATS, ranks=(3,)),  # [batch, rows, num_heads * head_dim]
        TensorSpec("key", FLOATS, ranks=(3,)),  # [batch, rows, num_kv_heads * head_dim]
        TensorSpec("value", FLOATS, ranks=(3,)),  # [batch, rows, num_kv_heads * head_dim]
        # [batch, num_kv_heads, capacity, head_dim]
        TensorSpec("past_key", FLOATS, ranks=(4,)),
        TensorSpec("past_value", FLOATS, ranks=(4,)),
        TensorSpec("write_index", ("int64",), ranks=(1,)),  # [batch], next free cache row
        TensorSpec("row_lengths", ("int64",), ranks=(1,)),  # [batch], rows that are valid
    ),
    outputs=(
        TensorSpec("output", like="query"),  # [batch, rows, num_heads * head_dim]
        TensorSpec("present_key", like="past_key", aliases="past_key"),
        TensorSpec("present_value", like="past_value", aliases="past_value"),
    ),
    attributes={"num_heads": int, "kv_num_heads": int, "scale": float},
    output_shapes=_output_shapes,
)
