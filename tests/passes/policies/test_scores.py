from __future__ import annotations

import re

import helpers
import numpy as np
import pytest
from policy_graphs import empty_graph

from dllava_export.errors import PostconditionError
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.graph_io import model_from_graph
from dllava_export.passes.policies.scores import check_scores, keep_above_zero


def test_keeps_scores_above_zero() -> None:
    graph, inputs = empty_graph("position_ids")
    builder = GraphBuilder(graph, "policy")
    (positions,) = inputs.values()
    scores = builder.op("Cast", [positions], "scores", np.float32, positions.shape, to=1)
    graph.outputs = [keep_above_zero(builder, scores)]
    feeds = {"position_ids": np.array([[-1, 0, 1]])}
    (keep,) = helpers.run(model_from_graph(graph), feeds).values()
    assert keep.tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    ("dtype", "axes", "found"),
    [
        pytest.param(np.float16, slice(2), "float16 and shape ['batch', 'rows']", id="type"),
        pytest.param(np.float32, slice(1), "float32 and shape ['batch']", id="shape"),
    ],
)
def test_refuses_scores_that_cannot_be_ranked(dtype, axes: slice, found: str) -> None:
    graph, inputs = empty_graph("hidden_states")
    hidden = inputs["hidden_states"]
    builder = GraphBuilder(graph, "policy")
    scores = builder.op("Identity", [hidden], "scores", dtype, hidden.shape[axes])
    message = (
        f"Policy 'mine' gave scores of type {found}, expected float32 and ['batch', 'rows']"
    )
    with pytest.raises(PostconditionError, match=re.escape(message)):
        check_scores("mine", scores, hidden)
