"""Check every Triton kernel on the GPU against its reference, and time it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_report import Report, Row

from dllava_export.plugins import PLUGIN_OPS

if TYPE_CHECKING:
    from dllava_export.plugins.kernel_cases import KernelCase

__all__ = ["check_kernels", "copy_bandwidth", "milliseconds"]

_REPEATS = 50
COPY_BYTES = 1 << 30


def check_kernels(report: Report) -> None:
    """Add a row per kernel and size: equal or not, time, share of the copy bandwidth.

    A kernel that cannot be started counts as wrong; the others are still run.
    """
    from dllava_export.plugins.kernel_cases import full_cases

    bandwidth = copy_bandwidth()
    report.environment["copy bandwidth"] = f"{bandwidth / 1e9:.0f} GB/s"
    for op in PLUGIN_OPS:
        for case in full_cases(op):
            try:
                passed, figures = _checked(case, bandwidth)
            except Exception as error:  # Triton's and CUDA's errors share no base class
                passed, figures = False, {"failure": f"{type(error).__name__}: {error}"}
            report.rows.append(Row("kernels", str(case), passed, figures))


def _checked(case: KernelCase, bandwidth: float) -> tuple[bool, dict[str, Any]]:
    from dllava_export.plugins.check_kernels import check_case, prepare_case

    result = check_case(case, "cuda")
    start, _ = prepare_case(case, "cuda")
    elapsed = milliseconds(start)
    figures = {
        "error": result.error,
        "wrong": result.num_wrong,
        "ms": elapsed,
        "GB/s": result.bytes_moved / elapsed / 1e6,
        "share of bandwidth": result.bytes_moved / elapsed / bandwidth * 1e3,
        "TFLOP/s": result.flops / elapsed / 1e9,
    }
    return result.passed, figures


def milliseconds(start: Callable[[], None]) -> float:
    """Return the time of one launch in a row of them, after three to warm up."""
    import torch

    for _ in range(3):
        start()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(_REPEATS):
        start()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / _REPEATS


def copy_bandwidth() -> float:
    """Return bytes read and written per second by a large copy on the GPU."""
    import torch

    source = torch.zeros(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    elapsed = milliseconds(copy)
    return 2 * COPY_BYTES / elapsed * 1e3
