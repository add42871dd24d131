"""What a validation compares, and how close it must come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dllava_export.backends.registry import DEFAULT_BACKEND
from dllava_export.errors import SettingError
from dllava_export.precision import BF16, FP16, FP32
from dllava_export.settings import check_whole_numbers, real_number

if TYPE_CHECKING:
    from dllava_export.bundles.manifest import Manifest


__all__ = ["ERROR_STATS", "REFERENCES", "Tolerances", "ValidationSettings", "tolerances_for"]

REFERENCES = ("onnxruntime", "dense", "torch")
ERROR_STATS = ("elemwise", "max", "mean", "median", "quantile")
"""As polygraphy's `--check-error-stat` spells them."""


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """How close two runs must come.

    Attributes:
        rtol: Largest relative error; also of one row of a layer, in the 2-norm.
        atol: Largest absolute error.
        check_error_stat: Which statistic of the errors must be below them; `elemwise` asks of
            each element that it keeps one of the two.
        margin: A token may be kept by one side alone if its score is closer than this to the
            score where selection ends. Log-probability for images, logits for generated text.
    """

    rtol: float
    atol: float
    check_error_stat: str
    margin: float


# Largest measured in fp32 between kernels and frameworks on golden models: 3e-6, on logits of
# up to 7, and 2e-4 on image scores of hundreds. The half types are held to a few units in the
# last place, grown over layers.
_DEFAULTS = {
    FP32: Tolerances(1e-4, 2e-4, "elemwise", 1e-3),
    FP16: Tolerances(3e-2, 3e-2, "elemwise", 1e-2),
    BF16: Tolerances(1e-1, 1e-1, "elemwise", 1e-1),
}


@dataclasses.dataclass(frozen=True)
class ValidationSettings:
    """Settings of one validation.

    Attributes:
        backend: What runs the bundle, as `load` takes it.
        backend_options: The backend's own options, as `load` takes them.
        against: What it is compared with: `onnxruntime`, `dense` or `torch`.
        checkpoint: The checkpoint behind the bundle, folder or hub id, for `torch`.
        num_steps: Tokens fed back one by one; the same ones on both sides.
        seed: Of random inputs, where no prompt is given.
        layers: Compare hidden states, keys and values of every layer.
        rtol: See `Tolerances`; None takes what fits the bundle's precision.
        atol: Likewise.
        check_error_stat: See `Tolerances`.
        margin: See `Tolerances`; None takes what fits the bundle's precision.
        num_threads: Threads of the runtimes; their own default where None.
    """

    backend: str = DEFAULT_BACKEND
    backend_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    against: str = "onnxruntime"
    checkpoint: str | None = None
    num_steps: int = 16
    seed: int = 0
    layers: bool = False
    rtol: float | None = None
    atol: float | None = None
    check_error_stat: str = "elemwise"
    margin: float | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.against not in REFERENCES:
            raise SettingError(
                f"against must be one of {', '.join(REFERENCES)}, got {self.against!r}."
            )
        if self.check_error_stat not in ERROR_STATS:
            raise SettingError(
                f"check_error_stat must be one of {', '.join(ERROR_STATS)}, got "
                f"{self.check_error_stat!r}."
            )
        check_whole_numbers(self, 1, "num_steps", "num_threads")
        check_whole_numbers(self, 0, "seed")
        for name in ("rtol", "atol", "margin"):
            value = getattr(self, name)
            if value is not None and real_number(name, value) < 0:
                raise SettingError(f"{name} must be at least 0, got {value}.")
        if (self.against == "torch") != (self.checkpoint is not None):
            raise SettingError(
                f"against is {self.against!r} and checkpoint is {self.checkpoint!r}; the "
                "checkpoint that the bundle was exported from is needed for 'torch', and for "
                "nothing else."
            )

    @property
    def is_on_cpu(self) -> bool:
        """True where ONNX Runtime on the CPU is what is validated."""
        return (
            self.backend == DEFAULT_BACKEND
            and self.backend_options.get("provider", "cpu") == "cpu"
        )


def tolerances_for(settings: ValidationSettings, manifest: Manifest) -> Tolerances:
    """Return the tolerances of a run: what was asked for, else what fits the precision."""
    defaults = _DEFAULTS[manifest.precision.activations]
    chosen = {
        name: getattr(settings, name)
        for name in ("rtol", "atol", "margin")
        if getattr(settings, name) is not None
    }
    return dataclasses.replace(defaults, check_error_stat=settings.check_error_stat, **chosen)
