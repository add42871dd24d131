"""Compare two runs of one conversation: what must agree, what may differ, and where it starts.

Both sides may see different rows from `sparse_layer` on: one of them may be dense, or a token
whose score is a near-tie may be kept by one alone. What is computed from the same rows must
agree; what is computed from different rows is measured and called drift. Rows are matched by
their positions. Keys and values of layer `sparse_layer` must agree wherever both have a row:
they are computed row by row, from layers that see everything.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dllava_export.validation import outputs as out
from dllava_export.validation.checks import (
    DRIFT,
    MATCH,
    MISMATCH,
    Check,
    compare_rows,
    compare_values,
)
from dllava_export.validation.selection_checks import check_keep, check_kept_images
from dllava_export.validation.settings import Tolerances

if TYPE_CHECKING:
    from dllava_export.sparsity import Sparsity


__all__ = ["CompareConversations", "Shape"]

Outputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a conversation.

    Attributes:
        num_layers: Decoder layers.
        num_prompt: Rows of the prompt, image included.
        num_steps: Rows of the answer.
        image_start: First image row.
        num_image: Image rows; 0 without an image.
    """

    num_layers: int
    num_prompt: int
    num_steps: int
    image_start: int
    num_image: int


@dataclasses.dataclass(frozen=True)
class CompareConversations:
    """A comparison function for polygraphy: candidate first, reference second.

    Attributes:
        sparsity: The candidate's.
        shape: Of the conversation.
        tolerances: What is allowed.
        is_dense_reference: True where the reference prunes nothing.
    """

    sparsity: Sparsity
    shape: Shape
    tolerances: Tolerances
    is_dense_reference: bool

    def __call__(
        self, candidate: Outputs, reference: Outputs
    ) -> collections.OrderedDict[str, Check]:
        """Return checks by number and place, in the order in which a model computes things."""
        run = _Run(self, dict(candidate.items()), dict(reference.items()))
        run.compare_visual()
        run.compare_prefill()
        for step in range(self.shape.num_steps):
            run.compare_decode(step)
        run.compare_layers(out.CACHE)
        run.compare_recompute()
        # Numbered, so that no key is an output's name: polygraphy would make statistics of all
        # arrays behind such keys, for a log that nobody sees.
        return collections.OrderedDict(
            (f"{number} {check.place}", check) for number, check in enumerate(run.checks)
        )


class _Run:
    """One comparison as it goes along.

    Attributes:
        checks: So far.
        differs: Why the two sides see different rows from now on; empty while they do not.
    """

    def __init__(
        self, settings: CompareConversations, candidate: Outputs, reference: Outputs
    ) -> None:
        self.checks: list[Check] = []
        self.differs = ""
        self._sparsity = settings.sparsity
        self._shape = settings.shape
        self._tolerances = settings.tolerances
        self._is_dense_reference = settings.is_dense_reference
        self._sides = (candidate, reference)

    @property
    def _first_sparse(self) -> int:
        return (
            self._shape.num_layers if self._sparsity.is_dense else self._sparsity.sparse_layer
        )

    def compare_visual(self) -> None:
        """Compare image features."""
        self._compare(out.VISUAL, out.IMAGE_FEATURES)

    def compare_prefill(self) -> None:
        """Compare layer by layer, with the selection before the first sparse layer."""
        stage = out.PREFILL
        self.compare_layers(stage, end=self._first_sparse)
        if not self._sparsity.is_dense:
            self._compare_selection()
        self.compare_layers(stage, start=self._first_sparse)
        self._check_lengths(stage, self._shape.num_prompt, self._kept(0).size)
        self._compare_logits(stage)

    def compare_decode(self, step: int) -> None:
        """Compare one fed token."""
        stage = out.decode(step)
        self.compare_layers(stage, end=self._first_sparse)
        differs = self.differs
        if self._sparsity.has_keep_bit:
            self._compare_keep(stage)
        # The decision acts from the next step on: the token itself sees what it saw before.
        after, self.differs = self.differs, differs
        self.compare_layers(stage, start=self._first_sparse)
        self._check_lengths(
            stage, self._shape.num_prompt + step + 1, len(self._cached(0, step + 1))
        )
        self._compare_logits(stage)
        self.differs = after

    def compare_recompute(self) -> None:
        """Compare the pass without a cache."""
        stage = out.RECOMPUTE
        num_rows = [side[out.output(stage, out.NUM_ROWS)] for side in self._sides]
        earlier, self.differs = self.differs, ""
        if self._is_dense_reference and not self._sparsity.is_dense:
            if num_rows[0][0] < self._shape.num_prompt + self._shape.num_steps:
                self.differs = "the reference prunes nothing"
        else:
            self._compare_recomputed_rows(num_rows[0], num_rows[1], earlier)
        self.compare_layers(stage)
        self._compare_logits(stage)

    def compare_layers(self, stage: str, start: int = 0, end: int | None = None) -> None:
        """Compare what layers compute in a stage, as far as both sides put it out."""
        for index in range(self._shape.num_layers)[start:end]:
            for quantity in out.LAYER_QUANTITIES:
                name = out.layer(stage, index, quantity)
                if all(name in side for side in self._sides):
                    self._compare_layer(stage, index, quantity)

    def _compare_layer(self, stage: str, index: int, quantity: str) -> None:
        name = out.layer(stage, index, quantity)
        found, expected = (side[name] for side in self._sides)
        rows = [self._positions(stage, index, side) for side in (0, 1)]
        what = f"layers.{index}/{quantity}"
        for values, positions in zip((found, expected), rows, strict=True):
            if len(values) != len(positions):
                detail = f"{len(values)} rows, expected {len(positions)}"
                self.checks.append(Check(stage, what, MISMATCH, detail=detail))
                return
        common, here, there = np.intersect1d(rows[0], rows[1], return_indices=True)
        is_sparse = index >= self._first_sparse
        is_row_wise = index == self._first_sparse and quantity != out.HIDDEN_STATES
        judged = not (is_sparse and self.differs) or is_row_wise
        detail = "" if len(common) == len(rows[0]) else f"{len(common)} rows in common"
        self.checks.append(
            compare_rows(
                stage,
                what,
                found[here],
                expected[there],
                self._tolerances,
                judged=judged and len(common) > 0,
                detail=detail if judged else self.differs,
            )
        )

    def _positions(self, stage: str, layer: int, side: int) -> np.ndarray:
        """Return the positions of a side's rows in a layer's output."""
        shape = self._shape
        total = shape.num_prompt + shape.num_steps
        sees_all = layer < self._first_sparse or (side == 1 and self._is_dense_reference)
        if stage.startswith("decode"):
            return np.array([shape.num_prompt + int(stage.split(".")[1])])
        if stage == out.PREFILL:
            return np.arange(shape.num_prompt) if sees_all else self._kept(side)
        if sees_all:
            return np.arange(total)
        if stage == out.CACHE:
            return self._cached(side, shape.num_steps)
        return self._sides[side][out.output(out.RECOMPUTE, out.KEPT_ROWS)]

    def _kept(self, side: int) -> np.ndarray:
        return self._sides[side][out.output(out.PREFILL, out.KEPT_INDICES)]

    def _cached(self, side: int, num_steps: int) -> np.ndarray:
        """Return positions in the sparse caches after some steps, as the decisions say."""
        rows = [self._kept(side)]
        for step in range(num_steps):
            values = self._sides[side]
            stage = out.decode(step)
            is_forced = values.get(out.output(stage, out.FORCED), np.zeros(1, bool))
            if values[out.output(stage, out.KEEP)][0] and not is_forced[0]:
                rows.append(np.array([self._shape.num_prompt + step]))
        return np.concatenate(rows)

    def _compare_selection(self) -> None:
        stage = out.PREFILL
        if not self._is_dense_reference:
            self._compare(stage, out.IMAGE_SCORES)
        scores = self._sides[1].get(out.output(stage, out.IMAGE_SCORES))
        num_image = self._shape.num_image
        images = []
        for side in (0, 1):
            rows = self._kept(side) - self._shape.image_start
            images.append(rows[(rows >= 0) & (rows < num_image)])
        if self._is_dense_reference:
            expected = self._sparsity.num_kept_image_tokens(num_image)
            verdict = MATCH if len(images[0]) == expected else MISMATCH
            detail = f"{len(images[0])} of {num_image} image rows kept, expected {expected}"
            self.checks.append(Check(stage, out.KEPT_INDICES, verdict, detail=detail))
            if len(images[0]) < num_image:
                self.differs = "the reference prunes nothing"
            return
        check = check_kept_images(images[0], images[1], scores, self._tolerances.margin)
        self.checks.append(check)
        if not np.array_equal(images[0], images[1]):
            self.differs = f"rows differ since {check.place}"

    def _compare_keep(self, stage: str) -> None:
        name = out.output(stage, out.KEEP)
        found, expected = (bool(side[name][0]) for side in self._sides)
        if self._is_dense_reference:
            if not found and not self.differs:
                self.differs = "the reference prunes nothing"
            return
        margin = self._sides[1].get(out.output(stage, out.KEEP_MARGIN))
        check = check_keep(
            stage, found, expected, None if margin is None else float(margin[0]),
            self._tolerances.margin,
        )  # fmt: skip
        self.checks.append(check)
        if found != expected and not self.differs:
            self.differs = f"rows differ since {check.place}"

    def _check_lengths(self, stage: str, num_full: int, num_sparse: int) -> None:
        first = self._first_sparse
        expected = [num_full] * first + [num_sparse] * (self._shape.num_layers - first)
        found = self._sides[0][out.output(stage, out.CACHE_LENGTHS)].tolist()
        verdict = MATCH if found == expected else MISMATCH
        detail = f"{num_full} and {num_sparse}" if first < len(expected) else f"{num_full}"
        if verdict == MISMATCH:
            detail = f"{found}, expected {expected}"
        self.checks.append(Check(stage, out.CACHE_LENGTHS, verdict, detail=detail))

    def _compare_recomputed_rows(
        self, found: np.ndarray, expected: np.ndarray, earlier: str
    ) -> None:
        name = out.output(out.RECOMPUTE, out.KEPT_ROWS)
        rows = [side.get(name) for side in self._sides]
        is_same = found[0] == expected[0]
        if rows[0] is not None and rows[1] is not None:
            is_same = np.array_equal(rows[0], rows[1])
        elif earlier and is_same:  # the sets cannot be known
            self.differs = earlier
        detail = f"{found[0]} rows"
        verdict = MATCH
        if not is_same:
            verdict = DRIFT if earlier else MISMATCH
            detail = f"{found[0]} rows, expected {expected[0]}"
            self.differs = earlier or f"rows differ since {out.RECOMPUTE}/{out.NUM_ROWS}"
        self.checks.append(Check(out.RECOMPUTE, out.NUM_ROWS, verdict, detail=detail))

    def _compare_logits(self, stage: str) -> None:
        name = out.output(stage, out.LOGITS)
        found, expected = (side[name] for side in self._sides)
        here, there = int(found.argmax()), int(expected.argmax())
        detail = "same token" if here == there else f"token {here}, expected {there}"
        if self.differs:
            detail += f"; {self.differs}"
        self._compare(stage, out.LOGITS, judged=not self.differs, detail=detail)

    def _compare(
        self, stage: str, quantity: str, *, judged: bool = True, detail: str = ""
    ) -> None:
        name = out.output(stage, quantity)
        if all(name in side for side in self._sides):
            found, expected = (side[name] for side in self._sides)
            self.checks.append(
                compare_values(
                    stage,
                    quantity,
                    found,
                    expected,
                    self._tolerances,
                    judged=judged,
                    detail=detail,
                )
            )
