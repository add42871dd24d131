"""Check every Triton kernel on the GPU against its reference, and time it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_report import Report, Row

from dllava_export.plugins import PLUGIN_OPS

__all__ = ["check_kernels", "copy_bandwidth", "milliseconds"]

_REPEATS = 50
_COPY_BYTES = 1 << 30


def check_kernels(report: Report) -> None:
    """Add a row per kernel and size: equal or not, time, share of the copy bandwidth."""
    from dllava_export.plugins.check_kernels import check_case, prepare_case
    from dllava_export.plugins.kernel_cases import full_cases

    bandwidth = copy_bandwidth()
    report.environment["copy bandwidth"] = f"{bandwidth / 1e9:.0f} GB/s"
    for op in PLUGIN_OPS:
        for case in full_cases(op):
            result = check_case(case, "cuda")
            start, _ = prepare_case(case, "cuda")
            elapsed = milliseconds(start)
            figures: dict[str, Any] = {
                "error": result.error,
                "wrong": result.num_wrong,
                "ms": elapsed,
                "GB/s": result.bytes_moved / elapsed / 1e6,
                "share of bandwidth": result.bytes_moved / elapsed / bandwidth * 1e3,
                "TFLOP/s": result.flops / elapsed / 1e9,
            }
            report.rows.append(Row("kernels", str(case), result.passed, figures))


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

    source = torch.zeros(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    elapsed = milliseconds(lambda: target.copy_(source) and None)
    return 2 * _COPY_BYTES / elapsed * 1e3
