"""Trace a family's modules to dense ONNX graphs, on the meta device: no weight is loaded.

Weights appear as initializers that name their tensor and hold no data; `weights.attach_weights`
gives them a place on disk afterwards. So exporting 7B costs no more memory than its graph.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dllava_export import names
from dllava_export.reporting.interrupts import interrupts_as_themselves

if TYPE_CHECKING:
    import onnx
    import torch

    from dllava_export.checkpoints.checkpoint import Checkpoint
    from dllava_export.families.family import Traceable


__all__ = ["quiet_exporter", "trace", "trace_decoder", "trace_visual"]

logger = logging.getLogger(__name__)


def trace_decoder(checkpoint: Checkpoint, dtype: torch.dtype) -> onnx.ModelProto:
    """Trace the dense decoder.

    Args:
        checkpoint: Of any family.
        dtype: Precision of weights and activations.

    Returns:
        Inputs and output as of `ModelSpec.decoder`.
    """
    return trace(checkpoint.spec.decoder(), dtype)


def trace_visual(checkpoint: Checkpoint, dtype: torch.dtype) -> onnx.ModelProto:
    """Trace what turns pictures into features; see `trace_decoder` and `ModelSpec.visual`."""
    return trace(checkpoint.spec.visual(), dtype)


@interrupts_as_themselves()
def trace(traceable: Traceable, dtype: torch.dtype) -> onnx.ModelProto:
    """Trace, then let ONNX Script's optimizer tidy up the graph without looking at weights.

    Args:
        traceable: What to trace; its module becomes one of `dtype`.
        dtype: Precision of weights and activations.

    Returns:
        A graph whose weights have their canonical names.
    """
    import onnx_ir as ir
    import onnxscript.optimizer
    import torch

    from dllava_export.exporting.weights import CHECKPOINT_LOCATION

    example = tuple(
        value.to(dtype) if value.is_floating_point() else value for value in traceable.example
    )
    dims = {
        name: torch.export.Dim(name)
        for axes in traceable.inputs.values()
        for name in axes.values()
    }
    with torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            traceable.module.to(dtype=dtype).eval(),
            example,
            dynamo=True,
            opset_version=names.OPSET,
            input_names=list(traceable.inputs),
            output_names=list(traceable.outputs),
            dynamic_shapes={
                name: {axis: dims[dim] for axis, dim in axes.items()}
                for name, axes in traceable.inputs.items()
            },
            optimize=False,  # it would ask the meta device for data; done below
            verbose=False,
        )
    assert program is not None
    model = program.model
    weights: dict[str, tuple[ir.Value, ir.TensorProtocol]] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not getattr(getattr(tensor, "raw", None), "is_meta", False):
            continue
        buffer = _ending(traceable.buffers, name)
        if buffer is not None:
            value.const_value = ir.tensor(buffer.numpy(), name=name)
            continue
        # As graph inputs, weights are out of the optimizer's reach.
        value.const_value = None
        del model.graph.initializers[name]
        model.graph.inputs.append(value)
        weights[traceable.canonical(name)] = value, tensor
    with quiet_exporter():
        onnxscript.optimizer.optimize_ir(model)
    for name, (value, tensor) in weights.items():
        model.graph.inputs.remove(value)
        if not value.uses():  # such as the part of the tower above the feature layer
            continue
        value.name = name
        value.const_value = ir.ExternalTensor(
            CHECKPOINT_LOCATION,
            None,
            None,
            tensor.dtype,
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            base_dir="",
        )
        model.graph.initializers[name] = value
    proto = ir.serde.serialize_model(model)
    for entry in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input):
        del entry.metadata_props[:]  # PyTorch's source lines: of no use to anyone downstream
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    return proto


def _ending(buffers: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    return next((data for key, data in buffers.items() if name.endswith(key)), None)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress lines and version warnings off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for noisy in loggers:
        noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for noisy, level in zip(loggers, levels, strict=True):
            noisy.setLevel(level)
