"""Policies without weights."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export import names
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.policies.base import ImageRows
from dllava_export.passes.policies.scores import _F32, _evenly_spaced


def _uniform_image_scores(builder: GraphBuilder, rows: ImageRows) -> gs.Variable:
    shape = list(rows.token_kind.shape)
    column = [names.BATCH, 1]
    one, axis = builder.scalar(1, np.int64), builder.ints(1)
    image = builder.scalar(names.IMAGE, np.int64)
    is_image = builder.op("Equal", [rows.token_kind, image], "is_image", bool, shape)
    counted = builder.op("Cast", [is_image], "counted", np.int64, shape, to=7)
    total = builder.op("ReduceSum", [counted, axis], "num_image", np.int64, column, keepdims=1)
    axis_1 = builder.scalar(1, np.int64)
    rank = builder.op(
        "CumSum", [counted, axis_1], "rank", np.int64, shape, exclusive=1, reverse=0
    )
    dropped = builder.op(
        "Sub", [rows.row_lengths, rows.kept_lengths], "num_dropped", np.int64, [names.BATCH]
    )
    dropped = builder.op("Unsqueeze", [dropped, axis], "dropped", np.int64, column)
    kept = builder.op("Sub", [total, dropped], "num_kept_image", np.int64, column)
    divisor = builder.op("Max", [total, one], "divisor", np.int64, column)
    return _evenly_spaced(builder, rank, kept, divisor)


def _norm_scores(builder: GraphBuilder, hidden_states: gs.Variable) -> gs.Variable:
    shape = list(hidden_states.shape)
    hidden = builder.op("Cast", [hidden_states], "hidden_f32", _F32, shape, to=1)
    return builder.op(
        "ReduceL2", [hidden, builder.ints(-1)], "scores", _F32, shape[:2], keepdims=0
    )
