"""Between ONNX models and the graphs that passes transform. Weight bytes are never read."""

from __future__ import annotations

import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import UnsupportedModelError
from dllava_export.passes.sparse_ops import FUNCTION_TEXTS, function_proto

__all__ = ["check_opset", "graph_from_model", "model_from_graph"]

_OLDEST_OPSET = 18  # from here on, the ops of decoders mean the same up to names.OPSET


def graph_from_model(model: onnx.ModelProto) -> gs.Graph:
    """Import a model for transformation; external data stays where it is.

    Model-local functions of other domains are inlined, so that passes see one flat graph.

    Raises:
        UnsupportedModelError: If a custom op of domain `ai.dllava` is unknown, or the opset is
            out of the range that can be written as this toolkit's without conversion.
    """
    model = _inline_foreign_functions(model)
    check_opset(model)
    for node in model.graph.node:
        if node.domain == names.DOMAIN and node.op_type not in FUNCTION_TEXTS:
            raise UnsupportedModelError(
                f"Node {node.name!r} is of unknown op {names.DOMAIN}::{node.op_type}; known "
                f"are {', '.join(FUNCTION_TEXTS)}. The model comes from another version."
            )
    bare = onnx.ModelProto()
    bare.CopyFrom(_with_shapes(model))
    del bare.functions[:]
    graph = gs.import_onnx(bare)
    for node in graph.nodes:
        node.domain = node.domain or None
    return graph


def check_opset(model: onnx.ModelProto) -> None:
    """Raise `UnsupportedModelError` where the opset would need a conversion."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not _OLDEST_OPSET <= opset <= names.OPSET:
        raise UnsupportedModelError(
            f"The model has ONNX opset {opset}; this toolkit reads {_OLDEST_OPSET} to "
            f"{names.OPSET}. Export it with one of these."
        )


def model_from_graph(graph: gs.Graph) -> onnx.ModelProto:
    """Export a graph; functions are attached for exactly those custom ops that it uses."""
    graph.opset = names.OPSET
    domains = sorted({node.domain for node in graph.nodes if node.domain})
    graph.import_domains = [onnx.helper.make_opsetid("", names.OPSET)] + [
        onnx.helper.make_opsetid(domain, names.DOMAIN_VERSION) for domain in domains
    ]
    model = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = names.IR_VERSION
    model.producer_name = "dllava-export"
    used = {node.op for node in graph.nodes if node.domain == names.DOMAIN}
    model.functions.extend(function_proto(op) for op in sorted(used))
    return model


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Infer shapes where values have none; passes read ranks and head counts off them."""
    known = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    if all(name in known for node in model.graph.node for name in node.output if name):
        return model
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _inline_foreign_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    foreign = [(f.domain, f.name) for f in model.functions if f.domain != names.DOMAIN]
    if not foreign:
        return model
    from onnx import inliner

    return inliner.inline_selected_functions(model, foreign)
