"""Small questions about graphs that several passes ask."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

__all__ = [
    "constant_values",
    "descendants",
    "is_transpose",
    "producer",
    "producer_of",
    "rotations",
    "scalar_value",
    "unordered_inputs",
]


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that computes a tensor, None for inputs and constants."""
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None


def producer_of(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """Return the producer where it is one of the named standard ops, else None."""
    node = producer(tensor)
    return node if node is not None and node.op in ops and not node.domain else None


def rotations(attention: gs.Node) -> tuple[gs.Node, gs.Node] | None:
    """Return the rotary embeddings of an attention's queries and keys.

    None unless both rotate whole heads, in halves, by the same tables with a row per token.
    """
    query, key = (producer_of(tensor, "RotaryEmbedding") for tensor in attention.inputs[:2])
    if query is None or key is None or not (_is_plain(query) and _is_plain(key)):
        return None
    tables = zip(query.inputs[1:3], key.inputs[1:3], strict=True)
    return (query, key) if all(a is b for a, b in tables) else None


def _is_plain(rotation: gs.Node) -> bool:
    if rotation.attrs.get("interleaved", 0) or rotation.attrs.get("rotary_embedding_dim", 0):
        return False
    return len(rotation.inputs) == 3


def constant_values(tensor: gs.Tensor) -> np.ndarray | None:
    """Return the values of a constant held in the graph; None for variables and weights."""
    if not isinstance(tensor, gs.Constant):
        return None
    values = tensor._values
    if not isinstance(values, LazyValues):
        return np.asarray(values)
    # Not `tensor.values`: that would load them for good and write them in another form.
    return None if values.tensor.external_data else np.asarray(values.load())


def scalar_value(tensor: gs.Tensor) -> float | None:
    """Return the value of a constant with one element, else None."""
    values = constant_values(tensor)
    return float(values.reshape(-1)[0]) if values is not None and values.size == 1 else None


def unordered_inputs(node: gs.Node) -> list[tuple[gs.Tensor, gs.Tensor]]:
    """Return the two inputs of a commutative node in both orders."""
    first, second = node.inputs
    return [(first, second), (second, first)]


def is_transpose(node: gs.Node | None, perm: list[int]) -> TypeGuard[gs.Node]:
    """True for a Transpose with exactly this permutation."""
    if node is None or node.op != "Transpose":
        return False
    return list(node.attrs.get("perm", reversed(range(len(perm))))) == perm


def descendants(tensor: gs.Tensor) -> list[gs.Node]:
    """Return every node that depends on a tensor, in no particular order."""
    found: dict[int, gs.Node] = {}
    pending = list(tensor.outputs)
    while pending:
        node = pending.pop()
        if id(node) in found:
            continue
        found[id(node)] = node
        for output in node.outputs:
            pending.extend(output.outputs)
    return list(found.values())
