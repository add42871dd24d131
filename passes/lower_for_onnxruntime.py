"""Use what ONNX Runtime does best on its own terms; the portable model is a separate file.

Before:  KVCacheAttention(q, k, v, past, write_index, row_lengths)
After:   com.microsoft::GroupQueryAttention with past and present in one buffer, whose cost
         follows the valid rows instead of the capacity
Before:  MatMul(x, Transpose(weight))
After:   com.microsoft::FusedMatMul(x, weight, transB=1), which reads the weight as stored

Both kernels take other types on a GPU: there is no GroupQueryAttention in float32 with CUDA (the
body of KVCacheAttention runs instead, at the cost of the capacity), and no FusedMatMul in float16
on the CPU.

Requires  nothing.
Ensures   no KVCacheAttention is left that the kernel takes: its type, and heads that 8 divides.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.errors import PostconditionError, SettingError
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.patterns import is_transpose, producer

__all__ = ["LowerForOnnxRuntimePass"]

_MICROSOFT = "com.microsoft"
_PROVIDERS = ("cpu", "cuda")
_HEAD_DIM_UNIT = 8  # GroupQueryAttention refuses heads of other widths


@dataclasses.dataclass(frozen=True)
class LowerForOnnxRuntimePass(Pass):
    """Replace portable ops by ONNX Runtime's own where those are faster.

    Attributes:
        provider: Where it computes, `cpu` or `cuda`.
    """

    provider: str = "cpu"

    def __post_init__(self) -> None:
        """Check the provider."""
        if self.provider not in _PROVIDERS:
            raise SettingError(
                f"provider must be one of {', '.join(_PROVIDERS)}, got {self.provider!r}."
            )

    def apply(self, graph: gs.Graph) -> bool:
        """Lower every match; return True where there was one."""
        attentions = [node for node in graph.nodes if self._takes_attention(node)]
        lengths: dict[tuple[int, int], tuple[gs.Variable, gs.Variable]] = {}
        for node in attentions:
            key = id(node.inputs[5]), id(node.inputs[6])
            if key not in lengths:
                lengths[key] = _sequence_lengths(graph, node, f"group_{len(lengths)}")
            _lower_attention(node, *lengths[key])
        products = [node for node in graph.nodes if self._takes_product(node)]
        for node in products:
            node.op, node.domain = "FusedMatMul", _MICROSOFT
            transpose = producer(node.inputs[1])
            assert transpose is not None  # `_takes_product` saw it
            node.inputs[1] = transpose.inputs[0]
            node.attrs = {"transB": 1}
        return bool(attentions or products)

    def ensures(self, graph: gs.Graph) -> None:
        """No op may be left that this pass replaces."""
        for node in graph.nodes:
            if self._takes_attention(node):
                raise PostconditionError(f"{node.name!r} was not lowered.")

    def _takes_attention(self, node: gs.Node) -> bool:
        """True for a KVCacheAttention whose type and heads GroupQueryAttention takes."""
        if node.op != "KVCacheAttention" or node.inputs[3].shape[-1] % _HEAD_DIM_UNIT:
            return False
        return self.provider == "cpu" or node.inputs[3].dtype != np.float32

    def _takes_product(self, node: gs.Node) -> bool:
        """True for a MatMul by a transposed weight of a type that FusedMatMul takes."""
        if node.op != "MatMul" or node.domain:
            return False
        transpose = producer(node.inputs[1])
        if not is_transpose(transpose, [1, 0]):
            return False
        weight = transpose.inputs[0]
        if not isinstance(weight, gs.Constant):
            return False
        return self.provider == "cuda" or weight.dtype == np.float32


def _sequence_lengths(
    graph: gs.Graph, attention: gs.Node, scope: str
) -> tuple[gs.Variable, gs.Variable]:
    """Return seqlens_k [batch] and total_sequence_length [1], int32, shared by a cache group.

    seqlens_k is the last row each sample sees. A sample that feeds only padding still writes
    one row, at its write index.
    """
    builder = GraphBuilder(graph, f"onnxruntime/{scope}")
    batch = [names.BATCH]
    write_index, row_lengths = attention.inputs[5:7]
    one = builder.scalar(1, np.int64)
    fed = builder.op("Max", [row_lengths, one], "num_fed", np.int64, batch)
    end = builder.op("Add", [write_index, fed], "end", np.int64, batch)
    last = builder.op("Sub", [end, one], "last", np.int64, batch)
    seqlens = builder.op("Cast", [last], "seqlens_k", np.int32, batch, to=6)
    total = builder.op(
        "ReduceMax", [end, builder.ints(0)], "longest", np.int64, [1], keepdims=1
    )
    return seqlens, builder.op("Cast", [total], "total", np.int32, [1], to=6)


def _lower_attention(node: gs.Node, seqlens: gs.Variable, total: gs.Variable) -> None:
    node.op, node.domain = "GroupQueryAttention", _MICROSOFT
    node.inputs = [*node.inputs[:5], seqlens, total]
    node.attrs = {
        "num_heads": node.attrs["num_heads"],
        "kv_num_heads": node.attrs["kv_num_heads"],
        "scale": node.attrs["scale"],
    }
