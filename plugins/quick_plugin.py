"""The TensorRT face of a plugin: a quickly deployable plugin, compiled ahead of time.

TensorRT asks three things: dtypes and shapes of outputs, the ways to run it (tactics, which it
times), and for one of them the compiled kernel with its grid as symbolic expressions. All three
are answered from the descriptor and the kernel module. Functions get their signatures here, since
TensorRT reads names and types from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import GenericAlias, ModuleType
from typing import Any

from dllava_export import names
from dllava_export.plugins.compile_kernel import Launch, compile_kernel
from dllava_export.plugins.descriptor import Descriptor, Dim

__all__ = ["register_quick_plugin"]

_TENSORRT_NAMES = {
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
}


def register_quick_plugin(
    trt: ModuleType,
    trtp: ModuleType,
    descriptor: Descriptor,
    kernel: ModuleType,
    compute_capability: Callable[[], int],
) -> None:
    """Put a plugin into TensorRT's registry.

    Args:
        trt: TensorRT.
        trtp: Its `tensorrt.plugin`.
        descriptor: Of the plugin.
        kernel: Module with `tactics` and `launch`.
        compute_capability: Asked when a kernel is compiled, while an engine is built.
    """
    plugin = _QuickPlugin(trt, trtp, descriptor, kernel, compute_capability)
    plugin_id = f"{names.PLUGIN_NAMESPACE}::{descriptor.op}"
    outputs = GenericAlias(tuple, (trtp.TensorDesc,) * len(descriptor.outputs))
    tensors = dict.fromkeys((spec.name for spec in descriptor.inputs), trtp.TensorDesc)
    inputs = {**tensors, **descriptor.attributes}

    def describe(*arguments: Any, **attributes: Any) -> Any:
        return plugin.describe(arguments)

    def autotune(*arguments: Any) -> Any:
        return plugin.autotune(arguments)

    def ahead_of_time(*arguments: Any) -> Any:
        return plugin.ahead_of_time(arguments)

    _set_signature(describe, inputs, outputs)
    trtp.register(plugin_id)(describe)
    combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
    _set_signature(autotune, {**inputs, "outputs": outputs}, combinations)
    trtp.autotune(plugin_id)(autotune)
    kernel_parts = (str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs)
    result = GenericAlias(tuple, kernel_parts)
    _set_signature(ahead_of_time, {**inputs, "outputs": outputs, "tactic": int}, result)
    trtp.aot_impl(plugin_id)(ahead_of_time)


def _set_signature(function: Any, parameters: dict[str, Any], result: Any) -> None:
    function.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for name, kind in parameters.items()
        ],
        return_annotation=result,
    )


class _QuickPlugin:
    """What TensorRT calls, with its tensor descriptors as `arguments`."""

    def __init__(
        self,
        trt: ModuleType,
        trtp: ModuleType,
        descriptor: Descriptor,
        kernel: ModuleType,
        compute_capability: Callable[[], int],
    ) -> None:
        self._trt, self._trtp = trt, trtp
        self._descriptor, self._kernel = descriptor, kernel
        self._compute_capability = compute_capability
        self._data_types = {
            "float32": trt.float32,
            "float16": trt.float16,
            "bfloat16": trt.bfloat16,
            "int64": trt.int64,
            "int32": trt.int32,
        }

    def describe(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Return descriptors of the outputs."""
        tensors = self._named(arguments)
        descriptor = self._descriptor
        descriptor.check_ranks({name: tensor.ndim for name, tensor in tensors.items()})
        dtypes = descriptor.output_dtypes(self._dtypes(tensors))
        shapes = descriptor.output_shapes(
            {name: tuple(tensor.shape_expr) for name, tensor in tensors.items()}
        )
        return tuple(
            tensors[spec.aliases].aliased()
            if spec.aliases
            else self._trtp.from_shape_expr(
                shapes[spec.name], self._data_types[dtypes[spec.name]]
            )
            for spec in descriptor.outputs
        )

    def autotune(self, arguments: Sequence[Any]) -> list[Any]:
        """Return the one combination of dtypes, all layouts linear, and its tactics."""
        tensors, attributes = self._named(arguments), self._attributes(arguments)
        dtypes = self._dtypes(tensors)
        outputs = self._descriptor.output_dtypes(dtypes)
        names_in_order = [*dtypes.values(), *outputs.values()]
        types = ", ".join(_TENSORRT_NAMES[name] for name in names_in_order)
        tactics = self._kernel.tactics(self._shapes(tensors), dtypes, attributes)
        return [self._trtp.AutoTuneCombination(types, "LINEAR", list(tactics))]

    def ahead_of_time(self, arguments: Sequence[Any]) -> tuple[str, str, Any, Any]:
        """Return name and code of the kernel, launch parameters, integer parameters."""
        tensors, attributes = self._named(arguments), self._attributes(arguments)
        launch: Launch = self._kernel.launch(
            self._shapes(tensors), self._dtypes(tensors), attributes, arguments[-1]
        )
        compiled = compile_kernel(launch, self._compute_capability())
        parameters = self._trtp.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y, parameters.grid_z = launch.grid
        parameters.block_x = compiled.num_threads
        parameters.shared_mem = compiled.shared_bytes
        integers = self._trtp.SymIntExprs(len(launch.integers))
        for i, extent in enumerate(launch.integers.values()):
            integers[i] = self._trtp.SymInt32(extent)
        return compiled.name, compiled.ptx, parameters, integers

    def _named(self, arguments: Sequence[Any]) -> dict[str, Any]:
        specs = self._descriptor.inputs
        return {spec.name: arguments[i] for i, spec in enumerate(specs)}

    def _attributes(self, arguments: Sequence[Any]) -> dict[str, Any]:
        start = len(self._descriptor.inputs)
        return {
            name: arguments[start + i] for i, name in enumerate(self._descriptor.attributes)
        }

    def _dtypes(self, tensors: dict[str, Any]) -> dict[str, str]:
        known = {data_type: name for name, data_type in self._data_types.items()}
        return {
            name: known.get(tensor.dtype, str(tensor.dtype))
            for name, tensor in tensors.items()
        }

    def _shapes(self, tensors: dict[str, Any]) -> dict[str, tuple[Dim, ...]]:
        """Return extents, ints where they are fixed in the engine."""
        return {
            name: tuple(
                expression if extent < 0 else extent
                for extent, expression in zip(tensor.shape, tensor.shape_expr, strict=True)
            )
            for name, tensor in tensors.items()
        }
