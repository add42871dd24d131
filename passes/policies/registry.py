"""Policies: sub-graphs that score rows. Higher is kept; who competes is not decided here.

`predictor` is Dynamic-LLaVA's trained pair. The others need no weights: `random` (a hash of
the position, so that runs repeat), `uniform` (evenly spaced) and `norm` (length of the hidden
state). All arithmetic is float32 or integer in every precision: a near-tie decides what stays.

Source: Dynamic-LLaVA, `VisionPredictor` and `TextPredictor`; the others are baselines.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.policies.base import ImageRows
from dllava_export.passes.policies.predictor import (
    PredictorWeights,
    _predictor_head,
    _predictor_scores,
)
from dllava_export.passes.policies.scores import (
    _F32,
    _FIXED_POINT,
    _TEXT_SALT,
    _evenly_spaced,
    _hash,
)
from dllava_export.passes.policies.untrained import _norm_scores, _uniform_image_scores

__all__ = [
    "IMAGE_POLICIES",
    "TEXT_POLICIES",
    "check_text_policy",
    "insert_image_scores",
    "insert_text_decision",
]

IMAGE_POLICIES = ("predictor", "random", "uniform", "norm")
TEXT_POLICIES = ("predictor", "random", "uniform")


def insert_image_scores(
    builder: GraphBuilder, policy: str, rows: ImageRows, weights: PredictorWeights | None
) -> gs.Variable:
    """Return scores [batch, rows] float32; only those of image rows mean something."""
    if policy == "predictor":
        return _predictor_scores(builder, rows, weights or PredictorWeights({}))
    if policy == "random":
        return _hash(builder, rows.position_ids, 0)
    if policy == "uniform":
        return _uniform_image_scores(builder, rows)
    return _norm_scores(builder, rows.hidden_states)


def check_text_policy(policy: str, keep_rate: float) -> None:
    """Check the settings of passes that decide about generated tokens.

    Raises:
        ValueError: If the policy has no decision for a single token, or the rate is no share.
    """
    if not 0 < keep_rate < 1:
        raise ValueError(f"keep_rate must be in (0, 1), got {keep_rate}.")
    if policy not in TEXT_POLICIES:
        raise ValueError(
            f"policy {policy!r} has no decision for a single token; expected one of "
            f"{', '.join(TEXT_POLICIES)}."
        )


def insert_text_decision(
    builder: GraphBuilder,
    policy: str,
    hidden_states: gs.Variable,
    position_ids: gs.Variable,
    keep_rate: float,
    weights: PredictorWeights | None,
) -> tuple[gs.Variable, gs.Variable]:
    """Score generated tokens.

    Args:
        builder: Where new nodes are named.
        policy: `predictor`, `random` or `uniform`.
        hidden_states: [batch, rows, hidden_size].
        position_ids: [batch, rows] int64, original positions of these rows.
        keep_rate: Share to keep; the predictor decides by its own threshold instead.
        weights: The trained predictor, for `predictor`.

    Returns:
        scores [batch, rows] float32, keep [batch, rows] bool.
    """
    shape = list(hidden_states.shape[:2])
    if policy == "predictor":
        return _predictor_head(builder, hidden_states, weights or PredictorWeights({}))
    if policy == "random":
        drawn = _hash(builder, position_ids, _TEXT_SALT)
        scores = builder.op(
            "Sub", [builder.scalar(keep_rate, _F32), drawn], "margin", _F32, shape
        )
    else:
        rate = round(keep_rate * _FIXED_POINT)
        scores = _evenly_spaced(
            builder,
            position_ids,
            builder.scalar(rate, np.int64),
            builder.scalar(_FIXED_POINT, np.int64),
        )
    zero = builder.scalar(0.0, _F32)
    return scores, builder.op("Greater", [scores, zero], "keep", bool, shape)
