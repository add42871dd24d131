"""Time sessions on a GPU: prefill, and decode steps at several generated lengths."""

from __future__ import annotations

import statistics
import time
from typing import Any

from gpu_comparison import Prompt

from dllava_export.runtime.session import Session

__all__ = ["ROUNDS", "time_session"]

ROUNDS = 5
_WINDOW = 16  # decode steps per length


def time_session(session: Session, prompt: Prompt, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return median milliseconds of a prefill and of one decode step at each length.

    The first prefill and the first steps are left out: kernels are chosen and graphs captured
    then. A call returns when its logits are on the host, so wall-clock time is the GPU's.
    """
    num_new = max(lengths) + _WINDOW
    prefills = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        session.prefill(prompt.input_ids, **prompt.images, max_new_tokens=num_new)
        prefills.append(time.perf_counter() - start)
    steps = []
    for step in range(num_new):
        tokens = prompt.tokens[step % len(prompt.tokens)]
        start = time.perf_counter()
        session.decode(tokens)
        steps.append(time.perf_counter() - start)
    figures = {"prefill ms": 1e3 * statistics.median(prefills[1:])}
    for length in lengths:
        window = steps[max(length, 4) : length + _WINDOW]
        figures[f"decode@{length} ms"] = 1e3 * statistics.median(window)
    figures["KV MiB"] = session.kv_plan.total_bytes / 2**20
    return figures
