"""Run kernels and compare them with their references.

Tests do it in Triton's interpreter on the CPU, a machine with a GPU does it there:
`for case in full_cases(op): check_case(case, "cuda")`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export.plugins import PLUGIN_FOLDERS
from dllava_export.plugins.descriptor import Descriptor, TensorSpec
from dllava_export.plugins.kernel_cases import NUMPY_DTYPES, KernelCase, case_work, make_inputs

if TYPE_CHECKING:
    import torch

    from dllava_export.plugins.compile_kernel import Launch

__all__ = [
    "TOLERANCES",
    "CaseResult",
    "case_launch",
    "check_case",
    "compare_case",
    "plugin_part",
    "prepare_case",
    "reference_outputs",
    "run_case",
]

TOLERANCES = {
    # Sums of a few hundred products of values around 1, in another order.
    "float32": 2e-5,
    # Two units in the last of 11 bits.
    "float16": 2e-3,
    # Two units in the last of 8 bits.
    "bfloat16": 1.6e-2,
}
"""Largest |difference| / (1 + |value|) by dtype of an output; integers are compared exactly."""


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """How a kernel's outputs compare with the reference.

    Attributes:
        case: What was run.
        error: Largest |difference| / (1 + |value|) of floating outputs.
        tolerance: What `error` may be at most.
        num_wrong: Integers, and elements of moved data, that differ.
        bytes_moved: Bytes that the kernel has to read and write at least.
        flops: Floating point operations, a multiply-add counted as two.
    """

    case: KernelCase
    error: float
    tolerance: float
    num_wrong: int
    bytes_moved: int
    flops: int

    @property
    def passed(self) -> bool:
        """True where everything is as close as it must be."""
        return self.num_wrong == 0 and self.error <= self.tolerance


def plugin_part(op: str, part: str) -> Any:
    """Return `plugins/<folder of op>/<part>.py`, imported."""
    return importlib.import_module(f"dllava_export.plugins.{PLUGIN_FOLDERS[op]}.{part}")


def reference_outputs(case: KernelCase, seed: int = 0) -> dict[str, np.ndarray]:
    """Return what NumPy makes of a case."""
    inputs, attributes = make_inputs(case, seed)
    return plugin_part(case.op, "reference").reference(inputs, **attributes)


def case_launch(case: KernelCase, inputs: Mapping[str, np.ndarray], attributes: Any) -> Launch:
    """Return the launch that a plugin would make for these inputs."""
    shapes = {name: value.shape for name, value in inputs.items()}
    dtypes = {name: value.dtype.name for name, value in inputs.items()}
    return plugin_part(case.op, "kernel").launch(shapes, dtypes, attributes, case.tactic)


def prepare_case(
    case: KernelCase, device: str, seed: int = 0
) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
    """Return a function that starts the kernel once, and the outputs it writes.

    Caches are one buffer for input and output, as in an engine. Runs after the first give the
    same outputs again. Nothing is copied or allocated by the function, so it can be timed.
    """
    import torch

    inputs, attributes = make_inputs(case, seed)
    launch = case_launch(case, inputs, attributes)
    tensors = {name: _to_torch(value).to(device) for name, value in inputs.items()}
    outputs = {}
    for spec, shape, dtype in _output_specs(case, inputs):
        if spec.aliases:
            outputs[spec.name] = tensors[spec.aliases]
        else:  # filled with a number that no output has, so that a forgotten row shows
            empty = np.full(shape, -77, NUMPY_DTYPES[dtype])
            outputs[spec.name] = _to_torch(empty).to(device)
    moved = launch.outputs.get("kept", "")
    arguments = [
        *(_as_integers(t, moved) if name == "data" else t for name, t in tensors.items()),
        *launch.integers.values(),
        *(_as_integers(t, moved) if moved else t for t in outputs.values()),
    ]
    kernel: Any = launch.kernel
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}

    def start() -> None:
        kernel[launch.grid](*arguments, **launch.constants, **options)

    if device == "cuda":
        torch.cuda.synchronize()
    return start, outputs


def run_case(case: KernelCase, device: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Run a kernel once; on "cpu" only where TRITON_INTERPRET=1 was set before the import."""
    start, outputs = prepare_case(case, device, seed)
    start()
    return {name: _to_numpy(value) for name, value in outputs.items()}


def check_case(case: KernelCase, device: str, seed: int = 0) -> CaseResult:
    """Run a kernel and compare it with its reference."""
    return compare_case(case, run_case(case, device, seed), reference_outputs(case, seed))


def compare_case(
    case: KernelCase, actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> CaseResult:
    """Compare outputs; floating ones that were computed by tolerance, all others exactly."""
    error, tolerance, num_wrong = 0.0, 0.0, 0
    for name, value in expected.items():
        is_computed = name in ("scores", "output")
        if not is_computed:
            num_wrong += int((actual[name] != value).sum())
            continue
        tolerance = TOLERANCES[value.dtype.name]
        exact = value.astype(np.float64)
        difference = np.abs(actual[name].astype(np.float64) - exact) / (1 + np.abs(exact))
        worst = float(difference.max(initial=0.0))
        error = max(error, worst) if np.isfinite(worst) else float("inf")
    bytes_moved, flops = case_work(case)
    return CaseResult(case, error, tolerance, num_wrong, bytes_moved, flops)


def _output_specs(
    case: KernelCase, inputs: Mapping[str, np.ndarray]
) -> list[tuple[TensorSpec, tuple[int, ...], str]]:
    descriptor: Descriptor = plugin_part(case.op, "descriptor").DESCRIPTOR
    shapes = descriptor.output_shapes({name: value.shape for name, value in inputs.items()})
    dtypes = descriptor.output_dtypes({k: value.dtype.name for k, value in inputs.items()})
    return [(spec, shapes[spec.name], dtypes[spec.name]) for spec in descriptor.outputs]


def _to_torch(value: np.ndarray) -> torch.Tensor:
    import torch

    if value.dtype == NUMPY_DTYPES["bfloat16"]:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.copy())


def _to_numpy(value: torch.Tensor) -> np.ndarray:
    import torch

    value = value.cpu()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(NUMPY_DTYPES["bfloat16"])
    return value.numpy()


def _as_integers(value: torch.Tensor, pointer: str) -> torch.Tensor:
    import torch

    return value.view(getattr(torch, f"int{pointer.removeprefix('*i')}"))
