"""Asks plugins in TensorRT's registry what a build would ask: `registry_worker.py OUT.json`.

Run with `tensorrt_registry` of the conftest on the path: TensorRT's own Python module and plugin
registry without its builder. A builder evaluates dimension expressions; here they are numbers.
"""

from __future__ import annotations

import json
import operator
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tensorrt as trt

from dllava_export import names
from dllava_export.plugins import register_plugins

OPERATIONS = {
    trt.DimensionOperation.SUM: operator.add,
    trt.DimensionOperation.SUB: operator.sub,
    trt.DimensionOperation.PROD: operator.mul,
    trt.DimensionOperation.FLOOR_DIV: operator.floordiv,
    trt.DimensionOperation.EQUAL: lambda a, b: int(a == b),
}


class Number(trt.IDimensionExpr):
    """An expression whose value is known."""

    value: int

    def is_constant(self) -> bool:
        return False


def number(value: int) -> Number:
    made = Number.__new__(Number)  # the binding has no constructor
    made.value = int(value)
    return made


class Numbers:
    """What stands for the builder's `IExprBuilder`."""

    def constant(self, value: int) -> Number:
        return number(value)

    def operation(self, kind: Any, a: Number, b: Number) -> Number:
        return number(OPERATIONS[kind](a.value, b.value))


class Parameters(dict):
    """What stands for the builder's list of integer parameters."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name


def ask(question: dict) -> dict:
    """Return what one plugin says to inputs, as a builder would ask.

    A negative extent is one that changes from run to run; its size is what comes in this run.
    """
    dtypes = [getattr(trt, dtype) for dtype in question["dtypes"]]
    plugin = create(question["op"], question["attributes"])
    num_inputs = len(question["shapes"])
    types_out = plugin.get_output_data_types(dtypes, [len(s) for s in question["shapes"]])
    expressions = [[number(abs(extent)) for extent in shape] for shape in question["shapes"]]
    with mock.patch.object(trt, "DimsExprs", lambda rank: [None] * rank):
        shapes_out = plugin.get_output_shapes(expressions, [], Numbers())
    shapes_out = [[extent.value for extent in shape] for shape in shapes_out]
    static = [[max(extent, -1) for extent in shape] for shape in question["shapes"]]
    static += [[-1] * len(shape) for shape in shapes_out]
    both = [tensor(*pair) for pair in zip(static, [*dtypes, *types_out], strict=True)]
    combinations = plugin.get_supported_format_combinations(both, num_inputs)
    plugin.configure_plugin(both[:num_inputs], both[num_inputs:])
    answer = {
        "dtypes": [str(t).removeprefix("DataType.") for t in types_out],
        "shapes": shapes_out,
        "aliases": [plugin.get_aliased_input(i) for i in range(plugin.get_num_outputs())],
        "combination": [f"{c.type} {c.format}" for c in combinations],
        "tactics": sorted(plugin.get_valid_tactics()),
        "kind": type(plugin).__name__,
    }
    return answer | {
        "launches": [launch(plugin, both, num_inputs, t) for t in answer["tactics"]]
    }


def create(op: str, attributes: dict) -> Any:
    creator = trt.get_plugin_registry().get_creator(
        op, names.PLUGIN_VERSION, names.PLUGIN_NAMESPACE
    )
    fields = [
        trt.PluginField(
            name,
            np.array([value], np.float32 if isinstance(value, float) else np.int32),
            trt.PluginFieldType.FLOAT32
            if isinstance(value, float)
            else trt.PluginFieldType.INT32,
        )
        for name, value in attributes.items()
    ]
    return creator.create_plugin(
        op,
        names.PLUGIN_NAMESPACE,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )


def tensor(shape: list[int], dtype: Any) -> Any:
    description = trt.PluginTensorDesc()
    description.dims, description.type = shape, dtype
    description.format = trt.TensorFormat.LINEAR
    dynamic = trt.DynamicPluginTensorDesc()
    dynamic.desc = description
    return dynamic


def launch(plugin: Any, tensors: list, num_inputs: int, tactic: int) -> dict:
    """Return the launch of one tactic, and the code of its kernel."""
    recorded = []
    implementation = type(plugin).get_launch_params
    ahead_of_time = plugin.aot_impl_function

    def record(*arguments: Any) -> tuple:
        recorded.append(ahead_of_time(*arguments))
        return recorded[0]

    plugin.set_tactic(tactic)
    plugin.aot_impl_function = record
    integers = Parameters()
    implementation(
        plugin, [], tensors, num_inputs, types.SimpleNamespace(), integers, Numbers()
    )
    plugin.aot_impl_function = ahead_of_time
    parameters = recorded[0][2]
    name, code = plugin.get_kernel(
        [t.desc for t in tensors[:num_inputs]], [t.desc for t in tensors[num_inputs:]]
    )
    sizes = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
    return {
        "name": name,
        "ptx": code.decode(),
        "num_integers": integers.nbSymExprs,
        "integers": [entry._expr.value for entry in recorded[0][3]],
        **{size: getattr(parameters, size)._expr.value for size in sizes},
    }


def creators() -> list[str]:
    registry = trt.get_plugin_registry()
    return sorted(
        f"{creator.plugin_namespace}::{creator.name} {creator.plugin_version}"
        for creator in registry.all_creators
        if creator.plugin_namespace == names.PLUGIN_NAMESPACE
    )


def failure(question: dict) -> str:
    try:
        ask(question)
    except Exception as error:  # the test asserts what it says
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(questions: str, out: str) -> None:
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    answer = {
        "ops": register_plugins(trt, compute_capability=90),
        "again": register_plugins(trt, compute_capability=90),
        "creators": creators(),
        "version": trt.__version__,
        "answers": {name: ask(question) for name, question in asked["good"].items()},
        "failures": {name: failure(question) for name, question in asked["bad"].items()},
    }
    Path(out).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
