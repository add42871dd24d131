"""What a user may ask of `build`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from dllava_export.backends.trt.build.profile_shapes import ShapeOverrides
from dllava_export.backends.trt.trt_module import TENSORRT_BACKENDS, TENSORRT_RTX
from dllava_export.errors import SettingError
from dllava_export.settings import check_whole_numbers

__all__ = ["MAX_OPTIMIZATION_LEVEL", "BuildOptions"]

MAX_OPTIMIZATION_LEVEL = 5


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Settings of one build; None stands for the default.

    Attributes:
        backend: `tensorrt` or `tensorrt-rtx`.
        max_batch_size: Samples at once.
        max_input_len: Rows that one run may feed per sample, image tokens included. By default
            the image tokens and 512 more, or half of what the cache has beside the image.
        max_kv_cache_capacity: Rows per sample of each cache below `sparse_layer`, one spare row
            included. By default all the tokens that the model was made for, and the spare row.
        overrides: Shapes of `--min-shapes`, `--opt-shapes` and `--max-shapes`.
        timing_cache_file: File that tactic timings are read from and written to; by default
            one beside the engines. TensorRT only.
        builder_optimization_level: 0 to 5, higher takes longer; TensorRT's own by default.
        plugin_paths: Shared libraries with further plugins. TensorRT only.
        strip_weights: Leave weights out of the engines, to be refitted when they are loaded.
        compute_capabilities: GPUs to build for, for example `8.9`. TensorRT-RTX only.
        force: Build even if memory will probably not suffice.
    """

    backend: str
    max_batch_size: int = 1
    max_input_len: int | None = None
    max_kv_cache_capacity: int | None = None
    overrides: ShapeOverrides = dataclasses.field(default_factory=ShapeOverrides)
    timing_cache_file: Path | None = None
    builder_optimization_level: int | None = None
    plugin_paths: tuple[Path, ...] = ()
    strip_weights: bool = False
    compute_capabilities: tuple[str, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        if self.backend not in TENSORRT_BACKENDS:
            raise SettingError(
                f"backend must be {' or '.join(TENSORRT_BACKENDS)}, got {self.backend!r}."
            )
        check_whole_numbers(
            self, 1, "max_batch_size", "max_input_len", "max_kv_cache_capacity"
        )
        check_whole_numbers(self, 0, "builder_optimization_level")
        level = self.builder_optimization_level
        if level is not None and level > MAX_OPTIMIZATION_LEVEL:
            raise SettingError(
                f"builder_optimization_level must be 0 to {MAX_OPTIMIZATION_LEVEL}, got {level}."
            )
        self._check_backend()

    def _check_backend(self) -> None:
        is_rtx = self.backend == TENSORRT_RTX
        if is_rtx and self.timing_cache_file is not None:
            raise SettingError(
                "timing_cache_file is for tensorrt: TensorRT-RTX times nothing when it builds, "
                "its timing cache does nothing since 1.2. Leave it out."
            )
        if is_rtx and self.plugin_paths:
            raise SettingError(
                "plugin_paths are for tensorrt: TensorRT-RTX has no plugins. Leave them out."
            )
        if not is_rtx and self.compute_capabilities:
            raise SettingError(
                "compute_capabilities are for tensorrt-rtx: TensorRT builds for the GPU of the "
                "machine it runs on. Leave them out, or use backend tensorrt-rtx."
            )
        for value in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", value):
                raise SettingError(f"compute_capabilities must look like 8.9, got {value!r}.")
        if len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            given = ", ".join(self.compute_capabilities)
            raise SettingError(f"compute_capabilities must differ, got {given}.")
