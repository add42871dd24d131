"""Runs an op's small cases in Triton's interpreter: `python interpreter_worker.py OP OUT.npz`.

A process of its own: the interpreter is chosen by the environment before Triton is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

from dllava_export.plugins.check_kernels import run_case
from dllava_export.plugins.kernel_cases import small_cases


def with_bfloat16(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    """Return matrix products that widen bfloat16; the interpreter multiplies its bit patterns."""

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar.name != "bf16":
            return handle
        values = handle.data.view(ml_dtypes.bfloat16).astype(np.float32)
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    def create(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    return create


def main(op: str, out: str) -> None:
    builder = interpreter.InterpreterBuilder
    builder.create_dot = with_bfloat16(builder.create_dot)
    results = {}
    for i, case in enumerate(small_cases(op)):
        for name, value in run_case(case, "cpu").items():
            is_bfloat16 = value.dtype == ml_dtypes.bfloat16
            results[f"{i}/{name}"] = value.view(np.int16) if is_bfloat16 else value
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
