from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.errors import PostconditionError
from dllava_export.passes.fuse_rotary_embedding import FuseRotaryEmbeddingPass
from dllava_export.passes.graph_io import graph_from_model

INPUTS = "float[batch, 2, rows, 6] x, float[batch, rows, 3] angle"
SECOND_INPUT = "float[batch, 1, rows, 6] x_2"
CONSTANTS = """int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3},
    int64[1] end = {99}, int64[1] last = {-1}, int64[2] uneven = {2, 4}"""
TABLES = """
    twice = Concat <axis = -1> (angle, angle)
    cos = Cos (twice)
    sin = Sin (twice)
    cos_heads = Unsqueeze (cos, one)
    sin_heads = Unsqueeze (sin, one)
"""
TABLES_OF_TWO = "twin = Neg (angle)" + TABLES.replace("(angle, angle)", "(angle, twin)")
SLICES = """
    first_{x} = Slice ({x}, zero, three, last, one)
    second_{x} = Slice ({x}, three, end, last, one)
"""
SPLIT = "first_{x}, second_{x} = Split <axis = -1, num_outputs = 2> ({x})"
UNEVEN_SPLIT = "first_{x}, second_{x} = Split <axis = -1> ({x}, uneven)"
TURN = """
    negative_{x} = Neg (second_{x})
    turned_{x} = Concat <axis = -1> (negative_{x}, first_{x})
"""
SUM = """
    plain_{x} = Mul ({x}, cos_heads)
    crossed_{x} = Mul (turned_{x}, sin_heads)
    {y} = Add (plain_{x}, crossed_{x})
"""
HALVES = """
    cos_half = Slice (cos, zero, three, last)
    sin_half = Slice (sin, zero, three, last)
"""
OP = "{y} = RotaryEmbedding <interleaved = 0> ({x}, cos_half, sin_half)"
DECOMPOSED = [TABLES, SLICES, TURN, SUM]
FUSED = [TABLES, HALVES, OP]
FORMS = [
    pytest.param(DECOMPOSED, id="slices"),
    pytest.param([TABLES, SPLIT, TURN, SUM], id="split"),
]
OTHERS = [
    pytest.param(FUSED, id="fused already"),
    pytest.param([TABLES, SLICES, TURN.replace("Neg", "Abs"), SUM], id="no sign"),
    pytest.param([TABLES, SLICES, TURN, SUM.replace("(turned_", "(negative_")], id="no turn"),
    pytest.param([TABLES, UNEVEN_SPLIT, TURN, SUM], id="uneven split"),
    pytest.param([TABLES_OF_TWO, SLICES, TURN, SUM], id="halves of the table differ"),
    pytest.param([TABLES, SLICES, TURN, SUM.replace("cos_heads", "{x}")], id="no table"),
]


def rotary(parts: list[str]) -> onnx.ModelProto:
    """Return a graph that turns x to y, by parts of its text."""
    nodes = "".join(part.format(x="x", y="y") for part in parts)
    return helpers.model_from_text(
        f"({INPUTS}) => (float[batch, 2, rows, 6] y) <{CONSTANTS}> {{{nodes}}}"
    )


def rotary_of_two(tables: list[str], each: list[str]) -> onnx.ModelProto:
    pairs = [("x", "y"), ("x_2", "y_2")]
    nodes = "".join(tables) + "".join(p.format(x=x, y=y) for x, y in pairs for p in each)
    outputs = "float[batch, 2, rows, 6] y, float[batch, 1, rows, 6] y_2"
    return helpers.model_from_text(
        f"({INPUTS}, {SECOND_INPUT}) => ({outputs}) <{CONSTANTS}> {{{nodes}}}"
    )


@pytest.mark.parametrize("parts", FORMS)
def test_becomes_one_node(parts: list[str]) -> None:
    after = helpers.apply(rotary(parts), FuseRotaryEmbeddingPass())
    helpers.assert_same_graph(after, rotary(FUSED))


def test_query_and_key_share_half_tables() -> None:
    before = rotary_of_two([TABLES], DECOMPOSED[1:])
    after = helpers.apply(before, FuseRotaryEmbeddingPass())
    helpers.assert_same_graph(after, rotary_of_two([TABLES, HALVES], [OP]))


@pytest.mark.parametrize("parts", OTHERS)
def test_leaves_other_graphs_alone(parts: list[str]) -> None:
    helpers.assert_changes_nothing(rotary(parts), FuseRotaryEmbeddingPass())


def test_second_run_changes_nothing() -> None:
    after = helpers.apply(rotary(DECOMPOSED), FuseRotaryEmbeddingPass())
    helpers.assert_changes_nothing(after, FuseRotaryEmbeddingPass())


def test_reports_a_rotary_embedding_that_was_left() -> None:
    with pytest.raises(PostconditionError, match=r"^The rotary embedding at .* was left\.$"):
        FuseRotaryEmbeddingPass().ensures(graph_from_model(rotary(DECOMPOSED)))


@pytest.mark.parametrize("parts", FORMS)
def test_computes_the_same(parts: list[str]) -> None:
    rng = np.random.default_rng(2)
    shapes = {"x": (2, 2, 5, 6), "angle": (2, 5, 3)}
    feeds = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    before = rotary(parts)
    after = helpers.apply(before, FuseRotaryEmbeddingPass())
    helpers.assert_close(helpers.run(after, feeds)["y"], helpers.run(before, feeds)["y"])


def test_turning_keeps_the_length() -> None:
    x = np.random.default_rng(2).normal(size=(1, 2, 4, 6)).astype(np.float32)
    feeds = {"x": x, "angle": np.arange(12, dtype=np.float32).reshape(1, 4, 3)}
    y = helpers.run(helpers.apply(rotary(DECOMPOSED), FuseRotaryEmbeddingPass()), feeds)["y"]
    helpers.assert_close(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1))
