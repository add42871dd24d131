"""The contract of a graph pass, and a sequence of passes.

A pass states what it requires of a graph and what it ensures afterwards, and reports exactly
whether it modified anything. Passes walk the main graph: model-local functions of other
exporters are inlined when a model is read (`graph_io`), ours are opaque ops.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dllava_export.errors import DllavaExportError

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


__all__ = ["Pass", "PassResult", "run_passes"]

logger = logging.getLogger(__name__)


class Pass:
    """One transformation of a graph; subclasses are frozen dataclasses of their settings."""

    def requires(self, graph: gs.Graph) -> None:
        """Raise `PreconditionError` where the graph lacks what `apply` needs."""

    def apply(self, graph: gs.Graph) -> bool:
        """Transform the graph in place; return True where it was modified."""
        raise TypeError(f"{type(self).__name__} does not define apply")

    def ensures(self, graph: gs.Graph) -> None:
        """Raise `PostconditionError` where the graph is not what the pass promises."""

    def __call__(self, graph: gs.Graph) -> bool:
        """Check, apply, tidy up, check again; return True where the graph was modified."""
        self.requires(graph)
        modified = self.apply(graph)
        if modified:
            graph.cleanup(remove_unused_graph_inputs=False).toposort()
        self.ensures(graph)
        return modified

    @property
    def settings(self) -> dict[str, object]:
        """Simple settings by name, as a manifest records them."""
        assert dataclasses.is_dataclass(self)
        values = (
            (field.name, getattr(self, field.name)) for field in dataclasses.fields(self)
        )
        return {k: v for k, v in values if isinstance(v, bool | int | float | str)}


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What one pass of a sequence did."""

    name: str
    settings: dict[str, object]
    modified: bool
    num_nodes: int
    """Nodes of the main graph afterwards."""


def run_passes(graph: gs.Graph, passes: Sequence[Pass]) -> list[PassResult]:
    """Run passes in order.

    Raises:
        DllavaExportError: What the pass raised, with the pass named in a note.
    """
    results = []
    for step in passes:
        start = time.perf_counter()
        try:
            modified = step(graph)
        except DllavaExportError as error:
            error.add_note(f"in pass {step!r}")
            raise
        result = PassResult(type(step).__name__, step.settings, modified, len(graph.nodes))
        results.append(result)
        logger.info(
            "%s: %s, %d nodes, %.2f s",
            result.name,
            "modified" if modified else "nothing to do",
            result.num_nodes,
            time.perf_counter() - start,
        )
    return results
