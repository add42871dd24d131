"""GatherTokens: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from dllava_export.plugins.descriptor import FLOATS, Descriptor, Dim, Shape, TensorSpec

__all__ = ["DESCRIPTOR"]


def _output_shapes(shapes: Mapping[str, Shape]) -> dict[str, tuple[Dim, ...]]:
    data, index = shapes["data"], shapes["kept_indices"]
    return {"kept": (index[0], index[1], *list(data)[2:])}


DESCRIPTOR = Descriptor(
    op="GatherTokens",
    inputs=(
        TensorSpec("data", (*FLOATS, "int64", "int32"), ranks=(2, 3, 4)),  # [batch, rows, ...]
        TensorSpec("kept_indices", ("int64",), ranks=(2,)),  # [batch, num_kept]
    ),
    outputs=(TensorSpec("kept", like="data"),),  # [batch, num_kept, ...]
    attributes={},
    output_shapes=_output_shapes,
)
