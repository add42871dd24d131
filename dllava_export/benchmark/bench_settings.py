"""Settings of `bench`."""

from __future__ import annotations

import dataclasses

from dllava_export.backends.registry import DEFAULT_BACKEND

__all__ = ["BenchSettings"]


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        prompt_text_len: Text tokens of the prompt, beside the image.
        decode_lengths: Generated tokens already in the cache when decode steps are timed.
        batch_size: Samples, all alike.
        num_threads: Threads of every runtime.
        rounds: Turns; medians over them are reported.
        decode_steps: Decode steps per turn and length.
        backend: What runs the bundle itself: `onnxruntime`, `tensorrt` or `tensorrt-rtx`. Its
            dense form and transformers are compared with ONNX Runtime only.
    """

    prompt_text_len: int = 64
    decode_lengths: tuple[int, ...] = (0, 256)
    batch_size: int = 1
    num_threads: int = 2
    rounds: int = 5
    decode_steps: int = 8
    backend: str = DEFAULT_BACKEND
