from __future__ import annotations

import dataclasses

import helpers
import onnx_graphsurgeon as gs
import pytest

from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.base import Pass, run_passes
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model

MODEL = "(float[b, 8] x) => (float[b, 8] y) {y = Relu (x)}"


@dataclasses.dataclass(frozen=True)
class RenamePass(Pass):
    """Gives the output another name; fails on demand."""

    name: str
    parts: tuple[int, ...] = ()
    failure: type[Exception] | None = None

    def apply(self, graph: gs.Graph) -> bool:
        modified = graph.outputs[0].name != self.name
        graph.outputs[0].name = self.name
        return modified

    def ensures(self, graph: gs.Graph) -> None:
        if self.failure is not None:
            raise self.failure("It did not work.")


def test_results_say_what_each_pass_did() -> None:
    graph = graph_from_model(helpers.model_from_text(MODEL))
    results = run_passes(graph, [RenamePass("z"), RenamePass("z")])
    assert [(r.name, r.modified, r.num_nodes) for r in results] == [
        ("RenamePass", True, 1),
        ("RenamePass", False, 1),
    ]


def test_settings_are_the_simple_ones() -> None:
    assert RenamePass("z", (1, 2)).settings == {"name": "z"}


def test_errors_name_the_pass() -> None:
    graph = graph_from_model(helpers.model_from_text(MODEL))
    step = RenamePass("z", failure=PostconditionError)
    with pytest.raises(PostconditionError) as caught:
        run_passes(graph, [RenamePass("a"), step])
    assert caught.value.__notes__ == [f"in pass {step!r}"]


def test_a_refused_graph_is_left_as_it_was() -> None:
    graph = graph_from_model(helpers.model_from_text(MODEL))
    with pytest.raises(PreconditionError):
        run_passes(graph, [GatherLastRowPass()])
    assert [tensor.name for tensor in (*graph.inputs, *graph.outputs)] == ["x", "y"]


def test_a_pass_must_say_what_it_does() -> None:
    with pytest.raises(TypeError, match=r"^Pass does not define apply$"):
        Pass()(graph_from_model(helpers.model_from_text(MODEL)))
