"""Compile a Triton kernel ahead of time, without a GPU, to what TensorRT puts in an engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from dllava_export.errors import BackendError
from dllava_export.plugins.descriptor import Dim

__all__ = [
    "COMPUTE_CAPABILITIES",
    "MAX_SHARED_BYTES",
    "CompiledKernel",
    "Launch",
    "ahead_of_time_source",
    "compile_kernel",
    "drop_scratch_parameters",
]

COMPUTE_CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that every kernel is compiled for in the tests."""

MAX_SHARED_BYTES = 48 * 1024
"""What a launch may ask for without an opt-in call, which is TensorRT's to make, not ours."""

POINTER_TYPES = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int64": "*i64",
    "int32": "*i32",
}
"""NumPy's name of a dtype to Triton's type of a pointer to it."""

_ALIGNMENT_BYTES = 16  # the widest load; TensorRT's buffers are aligned to 256


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel with all that is fixed before it runs, and how it is started.

    Attributes:
        kernel: The `triton.jit` function. Its parameters are inputs, integers, outputs and
            constants, in this order and under these names.
        inputs: Name to Triton's pointer type.
        integers: Name to an extent, passed as int32.
        outputs: Name to Triton's pointer type.
        constants: Name to the value that the kernel is compiled with.
        grid: Number of blocks along x, y and z.
        num_warps: Warps of a block.
        num_stages: Depth of the software pipeline of loads in loops.
    """

    kernel: Callable[..., None]
    inputs: Mapping[str, str]
    integers: Mapping[str, Dim]
    outputs: Mapping[str, str]
    constants: Mapping[str, Any]
    grid: tuple[Dim, Dim, Dim]
    num_warps: int
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel as TensorRT takes it.

    Attributes:
        name: Name of the entry.
        ptx: Its code; the parameters are exactly inputs, integers and outputs.
        num_threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block, bytes.
    """

    name: str
    ptx: str
    num_threads: int
    shared_bytes: int


def ahead_of_time_source(launch: Launch) -> Any:
    """Return Triton's source object of a launch.

    Pointers are promised to be aligned to 16 bytes; index tensors are not, since the address
    of one sample's index is a multiple of 8.
    """
    from triton.compiler import ASTSource

    pointers = {**launch.inputs, **launch.outputs}
    signature = {
        **launch.inputs,
        **dict.fromkeys(launch.integers, "i32"),
        **launch.outputs,
        **dict.fromkeys(launch.constants, "constexpr"),
    }
    names = list(signature)
    assert names == list(launch.kernel.arg_names), (names, launch.kernel.arg_names)  # type: ignore[attr-defined]
    attributes = {
        (i,): [["tt.divisibility", _ALIGNMENT_BYTES]]
        for i, name in enumerate(names)
        if pointers.get(name, "*i64") != "*i64"
    }
    return ASTSource(launch.kernel, signature, dict(launch.constants), attributes)


def compile_kernel(launch: Launch, compute_capability: int) -> CompiledKernel:
    """Compile a kernel for one kind of GPU; takes seconds, and no GPU.

    Args:
        launch: What to compile; its grid and integers are not looked at.
        compute_capability: Ten times major plus minor, for example 89.

    Raises:
        BackendError: If the kernel needs memory that TensorRT does not give it.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        ahead_of_time_source(launch),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    data = compiled.metadata
    scratch = data.global_scratch_size + data.profile_scratch_size
    if scratch or data.shared > MAX_SHARED_BYTES:
        raise BackendError(
            f"Kernel {data.name} for compute capability {compute_capability} needs "
            f"{data.shared} bytes of shared memory and {scratch} bytes of scratch memory, "
            f"expected at most {MAX_SHARED_BYTES} and 0. Constants: {dict(launch.constants)}."
        )
    num_parameters = len(launch.inputs) + len(launch.integers) + len(launch.outputs)
    ptx = drop_scratch_parameters(compiled.asm["ptx"], data.name, num_parameters)
    return CompiledKernel(data.name, ptx, data.num_warps * 32, data.shared)


def drop_scratch_parameters(ptx: str, name: str, num_parameters: int) -> str:
    """Take off the scratch pointers that Triton appends to a kernel's parameters.

    TensorRT passes inputs, integers and outputs, nothing else. A launch reads as many
    parameters as the kernel declares, so two more would be read from behind the list.

    Args:
        ptx: The code of one kernel that uses no scratch memory.
        name: Name of its entry.
        num_parameters: How many parameters stay.

    Raises:
        BackendError: If a parameter that has to go is in use.
    """
    start, declaration, body = re.split(rf"(?<=\.entry {name}\(\n)([^)]*)(?=\n\))", ptx)
    declared = declaration.split(",\n")
    for line in declared[num_parameters:]:
        parameter = line.split()[-1]
        if re.search(rf"\b{parameter}\b", body):
            raise BackendError(
                f"Kernel {name} has {len(declared)} parameters and uses {parameter}, expected "
                f"{num_parameters} parameters. This release of Triton is not supported."
            )
    return start + ",\n".join(declared[:num_parameters]) + body
