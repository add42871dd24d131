from __future__ import annotations

import pytest

from dllava_export.benchmark.predictor_profile import (
    measure_predictor_share,
    share_of_last_run,
)
from dllava_export.errors import BackendError


def event(name: str, start: int, duration: int) -> dict[str, object]:
    return {"name": name, "ts": start, "dur": duration}


def test_share_counts_the_last_run_only():
    events = [
        event("model_run", 0, 100),
        event("layers.2/select_image/predictor/norm_kernel_time", 10, 90),
        event("model_run", 200, 50),
        event("layers.2/select_image/predictor/norm_kernel_time", 210, 4),
        event("layers.2/keep_bit/predictor/norm_kernel_time", 220, 1),
        event("layers.2/select_image/predictor/norm_fence_before", 230, 7),
        event("layers.2/attention_kernel_time", 240, 30),
    ]
    assert share_of_last_run(events, 2) == 0.1


def test_says_when_the_predictor_has_no_name():
    events = [event("model_run", 0, 50), event("layers.3/attention_kernel_time", 1, 2)]
    with pytest.raises(BackendError, match=r"has no node under layers\.3/select_image/ or"):
        share_of_last_run(events, 3)


def test_share_of_a_real_prefill(tiny_model):
    assert 0 < measure_predictor_share(tiny_model) < 1
