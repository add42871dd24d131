"""Policy `attention`: what the text behind the image looks at stays.

    readers = text rows among the last 64 rows of the prompt, and its last row
    score of row j = mean over readers i >= j of paid[i, j]

where paid is the attention of the layer before `sparse_layer` (`paid_attention.py`). The text
behind the image is the question, so that another question keeps other rows. Of a row that more
readers can see the mean is taken over more of them: text between two images gives neither an
advantage. 64 rows bound the cost by the prompt's length; longer questions read by their end.

Source    SparseVLM (arXiv:2410.04417), text rows as readers; SnapKV (arXiv:2404.14469), a
          window of the prompt's last rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.passes.policies.base import ImageArrays, ImageRows, Policy
from dllava_export.passes.policies.paid_attention import (
    last_prompt_row,
    paid_attention,
    paid_attention_arrays,
    row_numbers,
)
from dllava_export.passes.policies.scores import F32

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.geometry import Geometry
    from dllava_export.passes.graph_builder import GraphBuilder
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["AttentionPolicy"]

_WINDOW = 64


class AttentionPolicy(Policy):
    """Ranks image rows by the attention that the text behind them pays to them."""

    name = "attention"
    help = "attention that the text behind the image pays"
    image_tokens = "attention that the text behind the image pays, mean over rows"
    score_meaning = "attention of the question"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Return the mean over readers, [batch, rows] float32."""
        batch, num_rows = rows.token_kind.shape
        row = row_numbers(builder, rows.token_kind)
        last = last_prompt_row(builder, rows.token_kind, row)
        reader = _readers(builder, rows.token_kind, last)
        paid, visible = paid_attention(builder, rows.attention, row, reader)
        table, shape = [batch, _WINDOW, num_rows], [batch, num_rows]
        nothing, axis = builder.scalar(0.0, F32), builder.ints(1)
        counted = builder.op("Where", [visible, paid, nothing], "counted_paid", F32, table)
        total = builder.op("ReduceSum", [counted, axis], "total", F32, shape, keepdims=0)
        reads = builder.op("Cast", [visible], "reads", F32, table, to=1)
        number = builder.op("ReduceSum", [reads, axis], "num_readers", F32, shape, keepdims=0)
        one = builder.scalar(1.0, F32)  # rows behind the prompt have no reader
        number = builder.op("Max", [number, one], "divisor", F32, shape)
        return builder.op("Div", [total, number], "scores", F32, shape)

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return the mean over readers, [n] float32."""
        kinds = rows.attention.token_kind
        row = np.arange(len(kinds))
        last = row[np.isin(kinds, (names.PROMPT_TEXT, names.IMAGE))][-1]
        is_text = (kinds == names.PROMPT_TEXT) & (row <= last) & (row > last - _WINDOW)
        reader = row[is_text | (row == last)]
        paid = paid_attention_arrays(rows.attention, reader)
        number = (reader[:, None] >= row).sum(0)
        scores = paid.sum(0) / np.maximum(number, 1)
        return scores[kinds == names.IMAGE].astype(F32)

    def image_flops(self, geometry: Geometry) -> int:
        """Count the product of a full window of queries with the keys of the image rows."""
        width = geometry.num_heads * geometry.head_dim
        return 2 * _WINDOW * geometry.num_image_tokens * width


def _readers(
    builder: GraphBuilder, token_kind: gs.Tensor, last_row: gs.Variable
) -> gs.Variable:
    """Return numbers of the rows that read, [batch, 64] int64; below 0 where none does."""
    shape = [token_kind.shape[0], _WINDOW]
    back = builder.constant("rows_back", np.arange(_WINDOW), np.int64)
    is_last = builder.constant("is_last", np.arange(_WINDOW) == 0, bool)
    row = builder.op("Sub", [last_row, back], "window_row", np.int64, shape)
    zero = builder.scalar(0, np.int64)
    index = builder.op("Max", [row, zero], "window_index", np.int64, shape)
    kind = builder.op(
        "GatherTokens",
        [token_kind, index],
        "window_kind",
        np.int64,
        shape,
        domain=names.DOMAIN,
    )
    text = builder.scalar(names.PROMPT_TEXT, np.int64)
    is_text = builder.op("Equal", [kind, text], "is_text", bool, shape)
    reads = builder.op("Or", [is_text, is_last], "is_reader", bool, shape)
    none = builder.scalar(-1, np.int64)
    return builder.op("Where", [reads, row, none], "reader", np.int64, shape)
