from __future__ import annotations

import numpy as np
from policy_graphs import ScoreGraph, assert_nodes, image_feeds, reference_scores

from dllava_export.geometry import Geometry
from dllava_export.passes.policies.dart import DartPolicy

DART = DartPolicy()
SIZES = Geometry(3, 8, 12, 2, 1, 8, 11, num_image_tokens=10)


def test_nodes() -> None:
    assert_nodes(
        "dart",
        """
    hidden = Cast <to = 1> (h0)
    length = ReduceL2 <keepdims = 1> (hidden, last_axis)
    divisor = Max (length, shortest)
    unit = Div (hidden, divisor)
    row_length = Squeeze (length, last_axis)
    is_image = Equal (token_kind, two)
    image_length = Where (is_image, row_length, no_length)
    padded = Pad (image_length, pads, no_length)
    longest, pivot = TopK <axis = 1, largest = 1, sorted = 1> (padded, num_pivots)
    is_there = GreaterOrEqual (longest, nothing)
    pivot_row = Where (is_there, pivot, zero)
    direction = ai.dllava.GatherTokens (unit, pivot_row)
    direction_t = Transpose <perm = [0, 2, 1]> (direction)
    cosine = MatMul (unit, direction_t)
    column = Unsqueeze (is_there, axis_1)
    pivot_cosine = Where (column, cosine, no_pivot)
    nearest = ReduceMax <keepdims = 0> (pivot_cosine, last_axis)
    unlike = Neg (nearest)
    shortest_pivot = ReduceMin <keepdims = 1> (longest, axis_1)
    is_pivot = GreaterOrEqual (image_length, shortest_pivot)
    scores = Where (is_pivot, pivot_score, unlike)
""",
        ", float shortest = {1e-12}, float no_length = {-1}, int64[4] pads = {0, 0, 0, 8}, "
        "int64[1] num_pivots = {8}, float nothing = {0}, float no_pivot = {-2}, "
        "float pivot_score = {2}",
    )


def pictured(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return feeds whose image rows, of 8 numbers each, are these, between text rows."""
    feeds = image_feeds([[1, *[2] * len(rows), 1]])
    feeds["hidden_states"][0] = 100  # text is longer than all
    feeds["hidden_states"][0, 1:-1] = rows
    return feeds


def test_duplicates_score_lowest() -> None:
    rows = np.zeros((12, 8), np.float32)
    rows[:, 0] = 1 + np.arange(12) / 10  # all point one way; the last 8 are longest
    rows[2] = [0.1, 0.2, 0, 0, 0, 0, 0, 0]  # but this one
    scores = ScoreGraph(DART)(pictured(rows))[0, 1:-1]
    np.testing.assert_allclose(scores[:4], [-1, -1, -np.sqrt(0.2), -1], rtol=1e-6)
    assert scores[4:].tolist() == [2] * 8


def test_pivots_stay_however_many_rows_resemble_them() -> None:
    rows = np.ones((20, 8), np.float32)
    rows[5:13] = 2
    scores = ScoreGraph(DART)(pictured(rows))[0, 1:-1]
    assert (scores > 1).tolist() == [5 <= row < 13 for row in range(20)]


def test_text_is_no_pivot_where_image_rows_are_few() -> None:
    rows = np.eye(8, dtype=np.float32)[:3]
    feeds = pictured(rows)
    assert ScoreGraph(DART)(feeds)[0, 1:-1].tolist() == [2, 2, 2]
    assert reference_scores(DART, [[1, 2, 2, 2, 1]], feeds=feeds)[0].tolist() == [2, 2, 2]


def test_rows_of_one_length_are_all_pivots() -> None:
    rows = np.ones((12, 8), np.float32)
    feeds = pictured(rows)
    assert ScoreGraph(DART)(feeds)[0, 1:-1].tolist() == [2] * 12
    assert reference_scores(DART, [[1, *[2] * 12, 1]], feeds=feeds)[0].tolist() == [2] * 12


def test_counts_its_product() -> None:
    assert DART.image_flops(SIZES) == 2 * 10 * 8 * 8
