from __future__ import annotations

import re

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.replace_token_ids import ReplaceTokenIdsPass, token_embedding

WEIGHTS = helpers.random_weights(table=(11, 8), w=(8, 8))
INPUTS = "int64[batch, rows] input_ids, int64[batch, rows] position_ids"
OUTPUTS = "float[batch, rows, 8] y, int64[2] dims, int64[1] count"
CONSTANTS = "int64[1] axis_2 = {2}"
EMBED = "embedded = Gather (table, input_ids)"
REST = """
    product = MatMul ({embedded}, w)
    position = Unsqueeze (position_ids, axis_2)
    position_float = Cast <to = 1> (position)
    y = Add (product, position_float)
"""
SHAPES = """
    dims = Shape ({x})
    count = Shape <start = -1> ({x})
"""
SHAPES_AFTER = """
    dims = Shape <start = 0, end = 2> (inputs_embeds)
    count = Shape <start = 1, end = 2> (inputs_embeds)
"""


def with_ids(nodes: str = EMBED, positions: str = "position_ids") -> onnx.ModelProto:
    nodes += REST.format(embedded="embedded") + SHAPES.format(x="input_ids")
    text = f"({INPUTS}) => ({OUTPUTS}) <{CONSTANTS}> {{{nodes}}}"
    return helpers.model_from_text(text.replace("position_ids", positions), WEIGHTS)


def with_embeddings() -> onnx.ModelProto:
    nodes = REST.format(embedded="inputs_embeds") + SHAPES_AFTER
    text = f"({helpers.DENSE_INPUTS}) => ({OUTPUTS}) <{CONSTANTS}> {{{nodes}}}"
    return helpers.model_from_text(text, WEIGHTS)


def test_takes_embeddings_instead_of_ids() -> None:
    after = helpers.apply(with_ids(), ReplaceTokenIdsPass())
    helpers.assert_same_graph(after, with_embeddings())


def test_leaves_a_graph_with_embeddings_alone() -> None:
    helpers.assert_changes_nothing(with_embeddings(), ReplaceTokenIdsPass())


def test_second_run_changes_nothing() -> None:
    after = helpers.apply(with_ids(), ReplaceTokenIdsPass())
    helpers.assert_changes_nothing(after, ReplaceTokenIdsPass())


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param(
            "float_ids = Cast <to = 1> (input_ids) embedded = Unsqueeze (float_ids, axis_2)",
            id="no table",
        ),
        pytest.param(EMBED + " other = Gather (table, input_ids)", id="two tables"),
        pytest.param(EMBED + " mask = Equal (input_ids, axis_2)", id="ids compared"),
        pytest.param(
            EMBED + " last = Gather <axis = 1> (input_ids, axis_2)", id="ids gathered"
        ),
    ],
)
def test_refuses_ids_that_are_more_than_an_index(nodes: str) -> None:
    message = (
        "The decoder has neither the input 'inputs_embeds' nor an input 'input_ids' that one"
    )
    with pytest.raises(PreconditionError, match=message):
        helpers.apply(with_ids(nodes), ReplaceTokenIdsPass())


def test_refuses_a_graph_without_positions() -> None:
    model = with_ids(positions="positions")
    message = "The decoder has no input 'position_ids'; found ['input_ids', 'positions']."
    with pytest.raises(PreconditionError, match=re.escape(message)):
        helpers.apply(model, ReplaceTokenIdsPass())


def test_reports_ids_that_were_left() -> None:
    with pytest.raises(PostconditionError, match=r"^input_ids is still read after"):
        ReplaceTokenIdsPass().ensures(graph_from_model(with_ids()))


def test_computes_the_same_on_looked_up_rows() -> None:
    ids = np.array([[3, 0, 10], [1, 1, 7]])
    feeds = {"position_ids": np.tile(np.arange(3), (2, 1)), "input_ids": ids}
    expected = helpers.run(with_ids(), feeds)
    feeds["inputs_embeds"] = WEIGHTS["table"][ids]
    actual = helpers.run(helpers.apply(with_ids(), ReplaceTokenIdsPass()), feeds)
    for name in ("y", "dims", "count"):
        helpers.assert_close(actual[name], expected[name])


def test_the_table_can_be_had_before_it_goes() -> None:
    graph = graph_from_model(with_ids())
    table = token_embedding(graph)
    assert table is not None
    assert table.name == "table"
    ReplaceTokenIdsPass()(graph)
    assert token_embedding(graph) is None
    assert "table" not in graph.tensors()
