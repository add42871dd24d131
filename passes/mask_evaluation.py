"""Find out what an attention mask means by running the sub-graph that computes it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export.errors import PreconditionError
from dllava_export.passes.graph_io import model_from_graph
from dllava_export.passes.patterns import constant_values, producer

__all__ = ["evaluate_mask"]


def evaluate_mask(graph: gs.Graph, mask: gs.Tensor, *, batch: int, rows: int) -> np.ndarray:
    """Return which rows a mask lets which rows see, for a batch without padding.

    Args:
        graph: The graph that holds the mask.
        mask: Bool (true = visible) or float (0 = visible, very negative = hidden),
            broadcastable to [batch, num_heads, rows, rows].
        batch: Samples of the example.
        rows: Rows of the example.

    Returns:
        [..., rows, rows], bool, true where visible.

    Raises:
        PreconditionError: If the mask depends on weights.
    """
    values = constant_values(mask)
    if values is None:
        values = _run(_cut_out(graph, mask), batch, rows)
    return values if values.dtype == bool else values > -1


def _cut_out(graph: gs.Graph, mask: gs.Tensor) -> gs.Graph:
    nodes: dict[int, gs.Node] = {}
    pending = [producer(mask)]
    while pending:
        node = pending.pop()
        if node is None or id(node) in nodes:
            continue
        nodes[id(node)] = node
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and constant_values(tensor) is None:
                raise PreconditionError(
                    f"The attention mask {mask.name!r} depends on the weight {tensor.name!r}; "
                    "expected a causal mask computed from shapes, positions and padding. "
                    "Learned attention biases are not supported."
                )
            pending.append(producer(tensor))
    kept = [node for node in graph.nodes if id(node) in nodes]
    used = {id(tensor) for node in kept for tensor in node.inputs}
    inputs = [tensor for tensor in graph.inputs if id(tensor) in used]
    return gs.Graph(nodes=kept, inputs=inputs, outputs=[mask], opset=graph.opset)


def _run(graph: gs.Graph, batch: int, rows: int) -> np.ndarray:
    # Imported here: passes are otherwise usable without a runtime.
    import onnxruntime as ort

    feeds = {}
    for tensor in graph.inputs:
        shape = [batch, rows, *(int(d) for d in tensor.shape[2:])]
        if tensor.name == "position_ids":
            feeds[tensor.name] = np.tile(np.arange(rows, dtype=tensor.dtype), (batch, 1))
        else:  # an attention mask of ones means no padding; embeddings only lend their shape
            feeds[tensor.name] = np.ones(shape, dtype=tensor.dtype)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model_from_graph(graph).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    (values,) = session.run(None, feeds)
    return np.asarray(values)
