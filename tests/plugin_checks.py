"""What tests of all plugins do: an op's body on ONNX Runtime against a kernel's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import helpers
import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from dllava_export import names
from dllava_export.passes.sparse_ops import function_proto

TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(bool): TensorProto.BOOL,
}


def run_body(
    op: str,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.dtype],
    attributes: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Run the function that defines an op on ONNX Runtime.

    It has no bfloat16 on the CPU; such inputs are widened, outputs are float32 then.
    """
    inputs = {name: _widened(value) for name, value in inputs.items()}
    outputs = {name: _widened(np.zeros(0, dtype)).dtype for name, dtype in outputs.items()}
    infos = [
        [helper.make_tensor_value_info(n, TYPES[d], r) for n, d, r in entries]
        for entries in (
            [(name, value.dtype, [None] * value.ndim) for name, value in inputs.items()],
            [(name, dtype, None) for name, dtype in outputs.items()],
        )
    ]
    node = helper.make_node(op, list(inputs), list(outputs), domain=names.DOMAIN, **attributes)
    model = helper.make_model(
        helper.make_graph([node], op, *infos),
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(names.DOMAIN, 1)],
        functions=[without_plugin(function_proto(op))],
        ir_version=names.IR_VERSION,
    )
    return helpers.run(model, inputs)


def without_plugin(function: onnx.FunctionProto) -> onnx.FunctionProto:
    """Return a function whose nodes need not name a plugin."""
    copy = onnx.FunctionProto.FromString(function.SerializeToString())
    kept = [name for name in copy.attribute if not name.startswith("plugin_")]
    del copy.attribute[:]
    copy.attribute.extend(kept)
    return copy


def _widened(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == ml_dtypes.bfloat16 else value
