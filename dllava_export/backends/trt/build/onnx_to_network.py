"""Parse a lowered graph into a TensorRT network; failures name the node and its place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dllava_export import names
from dllava_export.backends.trt.build.node_places import NodePlaces
from dllava_export.errors import EngineBuildError
from dllava_export.pipeline import tensorrt_passes, transformed

if TYPE_CHECKING:
    import onnx


__all__ = ["build_failure", "custom_ops", "lowered_model", "network_from_onnx"]

logger = logging.getLogger(__name__)

_CUDA_PROBE = "cudaError 35"  # each failing call asks for a GPU, which need not be there
_MAX_MESSAGE = 600


def lowered_model(
    model: onnx.ModelProto,
    capacities: Mapping[str, int],
    plugin_ops: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Return a portable graph in the form that TensorRT takes; weights stay external.

    Args:
        model: The portable graph.
        capacities: Cache group → rows of each of its buffers, spare row included.
        plugin_ops: Custom ops that a registered plugin computes. Their bodies are left out:
            where a body is there, the parser may prefer it.
    """
    lowered, _ = transformed(model, tensorrt_passes(capacities, plugin_ops))
    bodies = [body for body in lowered.functions if body.name not in plugin_ops]
    del lowered.functions[:]
    lowered.functions.extend(bodies)
    return lowered


def network_from_onnx(
    trt: ModuleType,
    builder: Any,
    trt_log: Any,
    model: onnx.ModelProto,
    path: Path,
    places: NodePlaces,
) -> Any:
    """Return a network, strongly typed as the graph is.

    Args:
        trt: Module of `trt_module`.
        builder: A `trt.Builder`.
        trt_log: Logger of `trt_logger`.
        model: The lowered graph.
        path: The bundle's own graph file: external weights are looked for beside it.
        places: Places of the graph's nodes.

    Raises:
        EngineBuildError: If the parser refuses the graph.
    """
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, trt_log)
    trt_log.errors.clear()
    if not parser.parse(model.SerializeToString(), str(path)):
        reasons = [
            _parser_error(parser.get_error(i), places) for i in range(parser.num_errors)
        ]
        raise EngineBuildError(
            f"TensorRT cannot parse {path}: {' '.join(reasons) or _first(trt_log.errors)} "
            "Run with -vv to see all that TensorRT says."
        )
    return network


def _network_flags(trt: ModuleType) -> int:
    """Strong typing is a flag up to TensorRT 10; later versions know nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def build_failure(path: Path, errors: list[str], places: NodePlaces) -> EngineBuildError:
    """Return the error for a build that gave no engine.

    Args:
        path: The bundle's graph file.
        errors: What TensorRT reported, oldest first.
        places: Places of the graph's nodes.
    """
    told = [error for error in errors if _CUDA_PROBE not in error] or errors
    node = next(filter(None, map(places.find, told)), None)
    where = f" at node {node!r} ({places.place(node)})" if node is not None else ""
    return EngineBuildError(
        f"TensorRT cannot build an engine from {path}{where}: {_first(told)} Run with -vv to "
        "see all that TensorRT says."
    )


def _parser_error(error: Any, places: NodePlaces) -> str:
    """Return a parser's error as `node (op) in place: reason`.

    The error of a node in a function's body has no name; the calls that lead to it have.
    """
    stack = [str(call) for call in error.local_function_stack()]
    name = stack[0].rsplit(" (", 1)[0] if stack else error.node_name()
    op = error.node_operator()
    if stack:
        op = f"{op} in the body of {stack[0].rsplit(' (', 1)[-1].rstrip(')')}"
    reason = error.desc().split("[checkMacros", 1)[0]
    if not name:
        return _shortened(reason)
    return f"node {name!r} ({op}) at {places.place(name)}: {_shortened(reason)}"


def _first(messages: list[str]) -> str:
    return _shortened(messages[0]) if messages else "it gave no reason."


def _shortened(message: str) -> str:
    """Return a message of TensorRT on one line, ended by a full stop."""
    line = " ".join(message.split())
    if len(line) > _MAX_MESSAGE:
        line = line[:_MAX_MESSAGE] + "…"
    return line if line.endswith((".", "…")) else line + "."


def custom_ops(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the ops of domain `ai.dllava` in a graph, sorted."""
    return tuple(sorted({n.op_type for n in model.graph.node if n.domain == names.DOMAIN}))
