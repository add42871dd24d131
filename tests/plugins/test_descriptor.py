"""Descriptors agree with the ops' functions and the kernels' parameters."""

from __future__ import annotations

import pytest

from dllava_export.errors import BackendError
from dllava_export.passes.sparse_ops import function_proto
from dllava_export.plugins import PLUGIN_OPS
from dllava_export.plugins.check_kernels import plugin_part
from dllava_export.plugins.descriptor import Descriptor, num_blocks

RENAMED = {"num_kept": "slots"}


def descriptor(op: str) -> Descriptor:
    return plugin_part(op, "descriptor").DESCRIPTOR


@pytest.mark.parametrize("op", PLUGIN_OPS)
def test_names_are_those_of_the_op(op: str) -> None:
    function, plugin = function_proto(op), descriptor(op)
    inputs = [RENAMED.get(name, name) for name in function.input]
    assert plugin.op == op
    assert [spec.name for spec in plugin.inputs] == inputs
    assert [spec.name for spec in plugin.outputs] == list(function.output)
    attributes = [name for name in function.attribute if not name.startswith("plugin_")]
    assert list(plugin.attributes) == attributes


@pytest.mark.parametrize("op", PLUGIN_OPS)
def test_names_that_refer_to_inputs_exist(op: str) -> None:
    plugin = descriptor(op)
    known = {spec.name for spec in plugin.inputs} | {""}
    assert {spec.like for spec in plugin.outputs} <= known
    assert {spec.aliases for spec in plugin.outputs} <= known
    assert all(spec.dtypes or spec.like for spec in plugin.outputs)


def test_refuses_other_dtypes_and_ranks() -> None:
    plugin = descriptor("GatherTokens")
    with pytest.raises(BackendError, match="input 'kept_indices' has dtype int32, expected"):
        plugin.output_dtypes({"data": "float16", "kept_indices": "int32"})
    with pytest.raises(BackendError, match="input 'data' has rank 5, expected 2 or 3 or 4"):
        plugin.check_ranks({"data": 5, "kept_indices": 2})
    plugin.check_ranks({"data": 3, "kept_indices": 2})


@pytest.mark.parametrize(
    ("extent", "block", "expected"),
    [(0, 16, 1), (1, 16, 1), (16, 16, 1), (17, 16, 2), (5, 1, 5)],
)
def test_a_grid_is_never_empty(extent: int, block: int, expected: int) -> None:
    assert num_blocks(extent, block) == expected
