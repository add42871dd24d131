"""The result of a validation as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dllava_export.reporting.tables import aligned_lines
from dllava_export.sparsity import Sparsity
from dllava_export.validation import outputs as out
from dllava_export.validation.checks import DRIFT, MISMATCH, Check
from dllava_export.validation.comparison import Shape
from dllava_export.validation.settings import Tolerances

__all__ = ["ValidationReport"]

_VERDICT_ORDER = (MISMATCH, DRIFT)


@dataclasses.dataclass(frozen=True)
class ValidationReport:
    """What a validation found.

    Attributes:
        bundle: Its folder.
        candidate: What was validated.
        reference: What it was compared with.
        origin: Where the conversation comes from.
        shape: Of the conversation.
        sparsity: The bundle's.
        precision: The bundle's.
        tolerances: What was allowed.
        checks: In the order in which a model computes things.
    """

    bundle: str
    candidate: str
    reference: str
    origin: str
    shape: Shape
    sparsity: Sparsity
    precision: str
    tolerances: Tolerances
    checks: tuple[Check, ...]

    @property
    def first_mismatch(self) -> Check | None:
        """Where the two sides part; None where everything that must agree does."""
        return next((check for check in self.checks if not check), None)

    @property
    def passed(self) -> bool:
        """True without any mismatch."""
        return self.first_mismatch is None

    @property
    def has_layers(self) -> bool:
        """True where layers were compared."""
        return any(_is_layer(check) for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return everything, one entry per check."""
        first = self.first_mismatch
        return {
            "passed": self.passed,
            "first_mismatch": None if first is None else first.place,
            "bundle": self.bundle,
            "candidate": self.candidate,
            "reference": self.reference,
            "conversation": {"origin": self.origin, **dataclasses.asdict(self.shape)},
            "precision": self.precision,
            "sparsity": dataclasses.asdict(self.sparsity),
            "tolerances": dataclasses.asdict(self.tolerances),
            "checks": [check.to_json() for check in self.checks],
        }

    def to_text(self) -> str:
        """Return a table of stages, one of layers, and a verdict."""
        parts = [self._heading(), _table(_STAGE_COLUMNS, self._stage_rows())]
        if self.has_layers:
            parts.append(_table(_LAYER_COLUMNS, self._layer_rows()))
        parts.append(self._verdict())
        return "\n\n".join(parts)

    def _heading(self) -> str:
        shape, allowed = self.shape, self.tolerances
        pruned = "dense"
        if not self.sparsity.is_dense:
            sparsity = self.sparsity
            pruned = f"policy {sparsity.policy_text}, sparse layer {sparsity.sparse_layer}"
        return "\n".join(
            (
                f"bundle      {self.bundle} ({self.precision}, {pruned})",
                f"candidate   {self.candidate}",
                f"reference   {self.reference}",
                f"input       {shape.num_prompt} prompt rows, {shape.num_image} of them an "
                f"image; {shape.num_steps} forced tokens ({self.origin})",
                f"tolerances  rtol {allowed.rtol:g}, atol {allowed.atol:g}, "
                f"{allowed.check_error_stat}; margin {allowed.margin:g}",
            )
        )

    def _stage_rows(self) -> list[tuple[str, ...]]:
        rows = []
        plain = [check for check in self.checks if not _is_layer(check)]
        stages = dict.fromkeys(_stage_kind(check) for check in plain)
        for stage in stages:
            group = [check for check in plain if _stage_kind(check) == stage]
            for what in dict.fromkeys(check.what for check in group):
                same = [check for check in group if check.what == what]
                rows.append(_summary(stage, what, same))
        return rows

    def _layer_rows(self) -> list[tuple[str, ...]]:
        rows = []
        layers = [check for check in self.checks if _is_layer(check)]
        for index in range(self.shape.num_layers):
            cells = [str(index)]
            for stage, quantity in _LAYER_CELLS:
                what = f"layers.{index}/{quantity}"
                same = [c for c in layers if _stage_kind(c) == stage and c.what == what]
                cells.append(_layer_cell(same))
            rows.append(tuple(cells))
        return rows

    def _verdict(self) -> str:
        num_judged = sum(check.verdict != DRIFT for check in self.checks)
        num_drift = len(self.checks) - num_judged
        measured = f", {num_drift} only measured" if num_drift else ""
        first = self.first_mismatch
        if first is None:
            return f"MATCH: {num_judged} comparisons agree{measured}."
        num_failed = sum(not check for check in self.checks)
        text = (
            f"MISMATCH: {num_failed} of {num_judged} comparisons fail{measured}. "
            f"The first is {first.place}: {_numbers_in_words(first)}"
        )
        if not self.has_layers:
            text += "\nRun again with --layers to see in which layer it starts."
        return text


_STAGE_COLUMNS = ("stage", "what", "verdict", "max abs", "relative", "cosine", "detail")
_LAYER_CELLS = (
    (out.PREFILL, "key"),
    (out.PREFILL, "value"),
    (out.PREFILL, out.HIDDEN_STATES),
    ("decode", out.HIDDEN_STATES),
    (out.CACHE, "key"),
    (out.CACHE, "value"),
    (out.RECOMPUTE, out.HIDDEN_STATES),
)
_LAYER_COLUMNS = (
    "layer",
    "prefill key",
    "value",
    "hidden",
    "decode hidden",
    "cache key",
    "value",
    "recompute hidden",
)


def _is_layer(check: Check) -> bool:
    return check.what.startswith("layers.")


def _stage_kind(check: Check) -> str:
    """Return the stage; `decode` for every step of it."""
    return check.stage.split(".")[0]


def _worst(checks: Sequence[Check]) -> str:
    verdicts = {check.verdict for check in checks}
    return next((v for v in _VERDICT_ORDER if v in verdicts), checks[0].verdict)


def _summary(stage: str, what: str, checks: Sequence[Check]) -> tuple[str, ...]:
    """Put the steps of a stage together: worst verdict, largest errors."""
    verdict = _worst(checks)
    shown = next(check for check in checks if check.verdict == verdict)
    detail = shown.detail
    if len(checks) > 1:
        same = sum(check.verdict == verdict for check in checks)
        detail = f"{same} of {len(checks)} steps"
        if verdict == MISMATCH:
            detail += f", first {shown.stage}: {shown.detail}"
        elif what == out.LOGITS:
            tokens = sum(check.detail.startswith("same token") for check in checks)
            detail = f"{len(checks)} steps, same token in {tokens}"
            if verdict == DRIFT:
                detail += f"; {shown.stage} on: {shown.detail.partition('; ')[2]}"
    errors = [c.max_abs for c in checks if c.max_abs is not None]
    relative = [c.relative for c in checks if c.relative is not None]
    cosines = [c.cosine for c in checks if c.cosine is not None]
    return (
        stage,
        what.replace("_", " "),
        verdict,
        f"{max(errors):.1e}" if errors else "",
        f"{max(relative):.1e}" if relative else "",
        f"{min(cosines):.6f}" if cosines else "",
        detail,
    )


def _layer_cell(checks: Sequence[Check]) -> str:
    values = [check.relative for check in checks if check.relative is not None]
    if not checks:
        return ""
    mark = {MISMATCH: " !", DRIFT: " ~"}.get(_worst(checks), "")
    return f"{max(values):.1e}{mark}" if values else f"-{mark}"


def _numbers_in_words(check: Check) -> str:
    parts = [check.detail] if check.detail else []
    if check.max_abs is not None:
        parts.append(
            f"max abs {check.max_abs:.3g}, relative {check.relative:.3g}, cosine "
            f"{check.cosine:.6f}"
        )
    return "; ".join(parts) + "."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    is_used = [any(row[i] for row in rows) for i in range(len(columns))]
    shown = [
        [cell for cell, used in zip(row, is_used, strict=True) if used]
        for row in (columns, *rows)
    ]
    return "\n".join(aligned_lines(shown, num_left=len(columns)))
