"""Two samples, three heads that are rotated and one that is not, head_dim 8."""

from __future__ import annotations

import collections

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.graph_io import graph_from_model, model_from_graph
from dllava_export.passes.head_tables import HeadTables

INPUTS = "int64[batch, rows] position_ids, int64[batch, kept] kept_indices"
CONSTANTS = """<int64[1] two = {2}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] four = {4},
    int64[1] five = {5},
    int64[1] eight = {8}, int64[1] last = {-1}, float[4] frequencies = {1, 0.5, 0.25, 0.125},
    float[8] twice = {1, 0.5, 0.25, 0.125, 1, 0.5, 0.25, 0.125}, float f_three = {3.0}>"""
PARTS = {
    "positions": "column = Unsqueeze (position_ids, two) position = Cast <to = 1> (column)",
    "angles": "angles = Mul (position, frequencies)",
    "both": "both = Concat <axis = -1> (angles, angles)",
    "cos": "whole_cos = Cos (both) cos = Slice (whole_cos, zero, four, last)",
    "sin": "whole_sin = Sin (both) sin = Slice (whole_sin, zero, four, last)",
}
GATHER = (
    "kept_cos = ai.dllava.GatherTokens (cos, kept_indices) "
    "kept_sin = ai.dllava.GatherTokens (sin, kept_indices)"
)
WHOLE = "float[batch, rows, 4] cos, float[batch, rows, 4] sin"
KEPT = "float[batch, kept, 4] kept_cos, float[batch, kept, 4] kept_sin"
FEEDS = {
    "position_ids": np.array([[0, 7, 8, 11, 12], [1000, 3, 3, 2, 5000]]),
    "kept_indices": np.array([[0, 2, 4], [1, 3, 4]]),
}


def model(outputs: str = WHOLE, **parts: str) -> onnx.ModelProto:
    nodes = " ".join((PARTS | parts).values())
    if KEPT in outputs:
        nodes += f" {GATHER}"
    return helpers.model_from_text(f"({INPUTS}) => ({outputs}) {CONSTANTS} {{ {nodes} }}")


def by_head(before: onnx.ModelProto, *functions: str) -> onnx.ModelProto:
    """Return a model whose outputs are those of `before` with a row per head."""
    graph = graph_from_model(before)
    tables = HeadTables(GraphBuilder(graph, "tables"), num_rotated=3, num_heads=4)
    made = [
        [tables.table(given, function) for _ in range(2)]
        for given, function in zip(graph.outputs, functions, strict=True)
    ]
    assert all(first is again for first, again in made)
    graph.outputs = [first for first, _ in made]
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return model_from_graph(graph)


def counts(after: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in after.graph.node)


def assert_same_rotation(
    before: onnx.ModelProto, after: onnx.ModelProto, not_rotated: tuple[float, ...] = (1, 0)
) -> None:
    given, made = helpers.run(before, FEEDS).values(), helpers.run(after, FEEDS).values()
    for table, result, value in zip(given, made, not_rotated, strict=True):
        batch, rows, half = table.shape
        heads = result.reshape(batch, rows, 4, half)
        for head in range(3):
            helpers.assert_close(heads[:, :, head], table)
        np.testing.assert_array_equal(heads[:, :, 3], value)


def test_frequencies_stand_for_each_head() -> None:
    after = by_head(model(), "Cos", "Sin")
    assert_same_rotation(model(), after)
    ops = {"Unsqueeze": 1, "Cast": 1, "Mul": 1, "Cos": 1, "Sin": 1, "Reshape": 2}
    assert counts(after) == ops


def test_a_selection_selects_from_them() -> None:
    after = by_head(model(KEPT), "Cos", "Sin")
    assert_same_rotation(model(KEPT), after)
    assert (counts(after)["Where"], counts(after)["GatherTokens"]) == (0, 2)


def test_all_rows_and_a_selection_share_what_is_computed() -> None:
    before = model(f"{WHOLE}, {KEPT}")
    after = by_head(before, "Cos", "Sin", "Cos", "Sin")
    assert_same_rotation(before, after, (1, 0, 1, 0))
    assert [counts(after)[op] for op in ("Mul", "Cos", "Sin")] == [1, 1, 1]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"cos": "cos = Cos (angles)", "sin": "sin = Sin (angles)"}, id="no half"),
        pytest.param({"angles": "angles = Mul (frequencies, position)"}, id="turned"),
        pytest.param({"angles": "angles = Div (position, frequencies)"}, id="quotient"),
        pytest.param(
            {"both": "more = Mul (angles, f_three) both = Concat <axis = -1> (angles, more)"},
            id="other half",
        ),
        pytest.param({"both": "both = Mul (position, twice)"}, id="frequencies twice"),
        pytest.param(
            {
                "cos": PARTS["cos"].replace("zero, four", "one, five"),
                "sin": PARTS["sin"].replace("zero, four", "one, five"),
            },
            id="from the second",
        ),
        pytest.param(
            {
                "cos": PARTS["cos"].replace("four, last", "eight, last, two"),
                "sin": PARTS["sin"].replace("four, last", "eight, last, two"),
            },
            id="every other",
        ),
        pytest.param(
            {"cos": PARTS["cos"].replace("Cos (", "Sin ("), "sin": PARTS["sin"]},
            id="sines for cosines",
        ),
        pytest.param(
            {"positions": f"{PARTS['positions']} f = Mul (frequencies, f_three)"}
            | {"angles": "angles = Mul (position, f)"},
            id="computed frequencies",
        ),
    ],
)
def test_other_tables_are_repeated(parts: dict[str, str]) -> None:
    before = model(**parts)
    after = by_head(before, "Cos", "Sin")
    assert_same_rotation(before, after)
    assert counts(after)["Where"] >= 1


def test_constant_tables_are_repeated() -> None:
    rows = np.cos(np.arange(5)[None, :, None] * np.array([1, 0.5, 0.25, 0.125]))
    weights = {"table": rows.astype(np.float32)}
    text = f"({INPUTS}) => (float[1, 5, 4] cos) {{ cos = Identity (table) }}"
    before = helpers.model_from_text(text, weights)
    assert_same_rotation(before, by_head(before, "Cos"), (1,))
