"""Settings of `evaluate`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dllava_export.errors import SettingError
from dllava_export.evaluation.metrics.table import metric_by_name
from dllava_export.passes.policies.registry import NO_POLICY
from dllava_export.runtime.runs import MODES
from dllava_export.settings import check_whole_numbers, whole_number

__all__ = ["EvaluationSettings", "OnBadRecord"]


OnBadRecord = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How bundles are asked.

    Attributes:
        batch_size: Questions answered at once, those with truths of like length together.
        max_new_tokens: Tokens of an answer at most; None for 16 more than the longest truth.
        mode: `cache`, or `recompute` for a pass without KV cache per token.
        limit: Ask only the first so many usable questions; None for all.
        metric: How answers are judged, a name in `METRICS`; None for the first that suits all
            questions of the file.
        on_bad_record: `stop` at the first bad record, or `skip` them.
        allow_outside: Take images that lie outside the image folder.
        image_keep_tokens: Numbers of image tokens to sweep: every bundle is sparsified to each
            of them, and asked beside its dense decoder. Empty: bundles are asked as they are.
        policies: Policies of the sweep; empty for each bundle's own.
    """

    batch_size: int = 8
    max_new_tokens: int | None = None
    mode: str = "cache"
    limit: int | None = None
    metric: str | None = None
    on_bad_record: OnBadRecord = "stop"
    allow_outside: bool = False
    image_keep_tokens: tuple[int, ...] = ()
    policies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole_numbers(self, 1, "batch_size", "max_new_tokens", "limit")
        if self.mode not in MODES:
            raise SettingError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        for name in ("image_keep_tokens", "policies"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # the class is frozen
        self._check_sweep()
        if self.metric is not None:
            metric_by_name(self.metric)
        if self.on_bad_record not in ("stop", "skip"):
            raise SettingError(
                f"on_bad_record must be stop or skip, got {self.on_bad_record!r}."
            )

    def _check_sweep(self) -> None:
        numbers = self.image_keep_tokens
        for number in numbers:
            whole_number("image_keep_tokens", number, 1)
        if len({*numbers}) < len(numbers) or len({*self.policies}) < len(self.policies):
            raise SettingError(
                f"image_keep_tokens {numbers} and policies {self.policies} must not name one "
                "twice."
            )
        if NO_POLICY in self.policies:
            raise SettingError(
                f"policies must not hold {NO_POLICY!r}: a sweep always asks the dense decoder."
            )
        if self.policies and not numbers:
            raise SettingError(
                f"policies {self.policies} are for a sweep, which needs image_keep_tokens, "
                "such as 32,64,115."
            )
