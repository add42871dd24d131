"""How much of a prefill the image predictor takes, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllava_export.benchmark.random_model import RandomModel
from dllava_export.benchmark.session_subject import SparseSubject
from dllava_export.bundles import layout
from dllava_export.errors import BackendError

__all__ = ["measure_predictor_share", "share_of_last_run"]

_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
_SCOPES = ("select_image", "keep_bit")


def measure_predictor_share(model: RandomModel) -> float:
    """Return the share of a prefill at batch 1 that scoring and selecting tokens takes.

    The profile slows the run down, so no other time is taken from it.

    Raises:
        BackendError: If the profile names no node of the predictor.
    """
    import onnxruntime as ort

    from dllava_export.backends.ort.backend import lowered_model

    llm = model.bundle / layout.LLM_FOLDER
    options = ort.SessionOptions()
    options.intra_op_num_threads = model.settings.num_threads
    options.add_session_config_entry(_FOLDER_KEY, str(llm))
    options.enable_profiling = True
    options.profile_file_prefix = str(model.scratch / "profile")
    lowered = lowered_model(llm / layout.DECODER).SerializeToString()
    session = ort.InferenceSession(lowered, options, providers=["CPUExecutionProvider"])
    subject = SparseSubject(model, lambda _: session)  # it opens no graph but the decoder
    for _ in range(2):  # the first one warms up
        subject.prepare(1)
        subject.prefill()
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return share_of_last_run(events, model.settings.sparse_layer)


def share_of_last_run(events: list[dict[str, Any]], sparse_layer: int) -> float:
    """Return what the predictor's nodes took of the last run."""
    run = [event for event in events if event["name"] == "model_run"][-1]
    prefixes = tuple(f"layers.{sparse_layer}/{scope}/" for scope in _SCOPES)
    own = sum(
        event["dur"]
        for event in events
        if event["name"].startswith(prefixes)
        and event["name"].endswith("_kernel_time")
        and event["ts"] >= run["ts"]
    )
    if not own:
        raise BackendError(
            f"ONNX Runtime's profile has no node under {' or '.join(prefixes)}, where the "
            "passes put the predictor. The names in the lowered graph have changed."
        )
    return own / run["dur"]
