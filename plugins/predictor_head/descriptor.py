"""PredictorHead: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from dllava_export.plugins.descriptor import FLOATS, Descriptor, Dim, Shape, TensorSpec

__all__ = ["DESCRIPTOR"]


def _output_shapes(shapes: Mapping[str, Shape]) -> dict[str, tuple[Dim, ...]]:
    batch, rows, _ = shapes["hidden_states"]
    return {"scores": (batch, rows), "keep": (batch, rows)}


DESCRIPTOR = Descriptor(
    op="PredictorHead",
    inputs=(
        TensorSpec("hidden_states", FLOATS, ranks=(3,)),  # [batch, rows, hidden_size]
        TensorSpec("norm_weight", FLOATS, ranks=(1,)),  # [hidden_size]
        TensorSpec("norm_bias", FLOATS, ranks=(1,)),  # [hidden_size]
        TensorSpec("weight_1", FLOATS, ranks=(2,)),  # [width_1, hidden_size]
        TensorSpec("bias_1", FLOATS, ranks=(1,)),  # [width_1]
        TensorSpec("weight_2", FLOATS, ranks=(2,)),  # [width_2, width_1]
        TensorSpec("bias_2", FLOATS, ranks=(1,)),  # [width_2]
        TensorSpec("weight_3", FLOATS, ranks=(2,)),  # [width_3, width_2]
        TensorSpec("bias_3", FLOATS, ranks=(1,)),  # [width_3]
        TensorSpec("weight_4", FLOATS, ranks=(2,)),  # [2, width_3], row 0 keeps, row 1 drops
        TensorSpec("bias_4", FLOATS, ranks=(1,)),  # [2]
    ),
    outputs=(
        TensorSpec("scores", ("float32",)),  # [batch, rows], logit of keep
        TensorSpec("keep", ("int32",)),  # [batch, rows], 1 where kept
    ),
    attributes={"epsilon": float},
    output_shapes=_output_shapes,
)
