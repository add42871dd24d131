"""SelectTokens: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from dllava_export.plugins.descriptor import Descriptor, Dim, Shape, TensorSpec

__all__ = ["DESCRIPTOR"]


def _output_shapes(shapes: Mapping[str, Shape]) -> dict[str, tuple[Dim, ...]]:
    return {"kept_indices": (shapes["token_kind"][0], shapes["slots"][1])}


DESCRIPTOR = Descriptor(
    op="SelectTokens",
    inputs=(
        TensorSpec("scores", ("float32",), ranks=(2,)),  # [batch, rows]
        TensorSpec("token_kind", ("int64",), ranks=(2,)),  # [batch, rows]
        TensorSpec("slots", ("int64",), ranks=(2,)),  # [1, num_kept], only its shape is used
        TensorSpec("kept_lengths", ("int64",), ranks=(1,)),  # [batch]
    ),
    outputs=(TensorSpec("kept_indices", ("int64",)),),  # [batch, num_kept]
    attributes={},
    output_shapes=_output_shapes,
)
