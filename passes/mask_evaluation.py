"""Find out what an attention mask means by running the sub-graph that computes it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PreconditionError
from dllava_export.passes.graph_io import model_from_graph
from dllava_export.passes.patterns import constant_values, producer, scalar_value

__all__ = ["evaluate_example", "evaluate_mask", "numbers_of_rows"]

_FEW_ROWS, _MOST_ROWS = 5, 8192
_COMPARING_OPS = ("Add", "Sub", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")


def numbers_of_rows(graph: gs.Graph, mask: gs.Tensor) -> list[int]:
    """Return numbers of rows at which a mask shows what it is.

    A few rows tell causal from bidirectional. A sliding window shows only beyond its width,
    which the sub-graph holds as an integer; widths up to 8190 rows are looked for.
    """
    counts = {_FEW_ROWS}
    for node in _cut_out(graph, mask).graph.nodes:
        if node.op not in _COMPARING_OPS:
            continue
        for tensor in node.inputs:
            value = scalar_value(tensor)
            if value is not None and np.issubdtype(tensor.dtype, np.integer):
                counts.add(int(abs(value)) + 2)
    return sorted(count for count in counts if _FEW_ROWS <= count <= _MOST_ROWS)


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
    values = evaluate_example(graph, mask, batch=batch, rows=rows)
    return values if values.dtype == bool else values > -1


def evaluate_example(
    graph: gs.Graph, tensor: gs.Tensor, *, batch: int, rows: int
) -> np.ndarray:
    """Return a value that depends on no weight, for a batch without padding.

    Raises:
        PreconditionError: If the value depends on weights.
    """
    values = constant_values(tensor)
    return _run(_cut_out(graph, tensor), batch, rows) if values is None else values


@dataclasses.dataclass(frozen=True)
class _SubGraph:
    """The nodes that compute a mask.

    Attributes:
        graph: As a graph of its own. Shapes of values that hold more than shapes (a query,
            whose size a mask may ask for) are inputs of it.
        sizes: Name of such an input → its value; dimensions that vary by their name.
    """

    graph: gs.Graph
    sizes: dict[str, list[int | str]]


def _cut_out(graph: gs.Graph, mask: gs.Tensor) -> _SubGraph:
    if any(tensor is mask for tensor in graph.inputs):
        raise PreconditionError(
            f"The attention mask is the graph input {mask.name!r}, which may mean anything; "
            "expected one computed from shapes, positions and padding. Export with "
            "attention_mask [batch, rows], or without."
        )
    nodes: dict[int, gs.Node] = {}
    shapes: dict[int, gs.Tensor] = {}
    sizes: dict[str, list[int | str]] = {}
    pending = [producer(mask)]  # none where the mask is a constant
    while pending:
        node = pending.pop()
        if node is None or id(node) in nodes or id(node) in shapes:
            continue
        size = _known_size(node)
        if size is not None:
            (output,) = node.outputs
            shapes[id(node)] = output
            sizes[output.name] = size
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
    cut = gs.Graph(
        nodes=kept, inputs=[*inputs, *shapes.values()], outputs=[mask], opset=graph.opset
    )
    return _SubGraph(cut, sizes)


def _known_size(node: gs.Node) -> list[int | str] | None:
    """Return what a Shape node gives, None for others and where a dimension is not known."""
    if node.op != "Shape" or node.inputs[0].shape is None:
        return None
    size = list(node.inputs[0].shape)
    known = all(isinstance(dim, int) or dim in (names.BATCH, names.ROWS) for dim in size)
    return size[node.attrs.get("start", 0) : node.attrs.get("end")] if known else None


def _run(cut: _SubGraph, batch: int, rows: int) -> np.ndarray:
    # Imported here: passes are otherwise usable without a runtime.
    import onnxruntime as ort

    varying: dict[int | str, int] = {names.BATCH: batch, names.ROWS: rows}
    feeds = {}
    for tensor in cut.graph.inputs:
        if tensor.name in cut.sizes:
            dims = [varying.get(dim, dim) for dim in cut.sizes[tensor.name]]
            feeds[tensor.name] = np.array(dims, np.int64)
            continue
        shape = [batch, rows, *(d if isinstance(d, int) else rows for d in tensor.shape[2:])]
        if tensor.name == names.POSITION_IDS:
            feeds[tensor.name] = np.tile(np.arange(rows, dtype=tensor.dtype), (batch, 1))
        else:  # an attention mask of ones means no padding; embeddings only lend their shape
            feeds[tensor.name] = np.ones(shape, dtype=tensor.dtype)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model_from_graph(cut.graph).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    (values,) = session.run(None, feeds)
    return np.asarray(values)
