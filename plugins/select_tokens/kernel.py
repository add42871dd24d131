"""Which rows stay: the best by score, in their order; the lower row wins a tie.

    kept_indices[b] = ascending { i : rank of row i < kept_lengths[b] }, then rows - 1

Layouts: scores and token_kind [batch, rows], kept_indices [batch, num_kept].

One block owns one sample and holds no more than a chunk of it at a time, so the number of rows
has no limit. Scores become unsigned integers of the same order; the score of the last row that
stays is found bit by bit, from the highest, by counting rows that are no lower. One more sweep
numbers the rows that stay. 34 sweeps over 12 bytes per row, from the caches after the first:
bound by latency, not by bytes. Where every row stays, as in decode, nothing is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A kernel is decorated when its module is imported; import this one only to compile or run.
import triton
import triton.language as tl

from dllava_export.plugins.compile_kernel import Launch
from dllava_export.plugins.descriptor import Shape

__all__ = ["launch", "tactics"]

_BLOCK = 1024


@triton.jit
def _ranked_keys(
    scores: tl.tensor, token_kind: tl.tensor, row: tl.tensor, rows: tl.tensor
) -> tl.tensor:
    """Return what rows compete by, as integers; 0 outside the sample."""
    inside = row < rows
    score = tl.load(scores + row, mask=inside, other=0.0)
    kind = tl.load(token_kind + row, mask=inside, other=0)
    value = tl.where(kind == 2, score, tl.where(kind == 0, -3.0e38, 3.0e38))
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 and 0.0 are a tie
    bits = value.to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(inside, key, 0)


@triton.jit(do_not_specialize=["rows", "num_kept"])
def select_tokens(
    scores: tl.tensor,
    token_kind: tl.tensor,
    slots: tl.tensor,
    kept_lengths: tl.tensor,
    rows: tl.tensor,
    num_kept: tl.tensor,
    kept_indices: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write the kept indices of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    scores += sample * rows
    token_kind += sample * rows
    kept_indices += sample * num_kept
    lane = tl.arange(0, block)
    limit = tl.minimum(rows, num_kept).to(tl.int64)
    length = tl.load(kept_lengths + sample)
    wanted = tl.maximum(tl.minimum(length, limit), 0).to(tl.int32)

    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    num_bits = tl.where(wanted < rows, 32, 0)
    for _ in range(num_bits):
        candidate = threshold | bit
        count = 0
        for first in range(0, rows, block):
            key = _ranked_keys(scores, token_kind, first + lane, rows)
            count += tl.sum((key >= candidate).to(tl.int32))
        threshold = tl.where(count >= wanted, candidate, threshold)
        bit = bit >> 1

    above = 0
    for first in range(0, rows, block):
        key = _ranked_keys(scores, token_kind, first + lane, rows)
        above += tl.sum((key > threshold).to(tl.int32))
    num_tied = wanted - above

    kept_before = 0
    tied_before = 0
    for first in range(0, rows, block):
        row = first + lane
        key = _ranked_keys(scores, token_kind, row, rows)
        tied = ((key == threshold) & (row < rows)).to(tl.int32)
        tie = tied_before + tl.cumsum(tied)
        kept = (key > threshold) | ((tied == 1) & (tie <= num_tied))
        position = kept_before + tl.cumsum(kept.to(tl.int32)) - 1
        tl.store(kept_indices + position, row.to(tl.int64), mask=kept)
        kept_before += tl.sum(kept.to(tl.int32))
        tied_before += tl.sum(tied)

    last_row = rows - 1
    for first in range(0, num_kept, block):
        slot = first + lane
        unused = (slot >= wanted) & (slot < num_kept)
        tl.store(kept_indices + slot, last_row.to(tl.int64), mask=unused)


def tactics(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str], attributes: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the numbers of the ways to run it: one."""
    return (1,)


def launch(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
    attributes: Mapping[str, Any],
    tactic: int,
) -> Launch:
    """Return the launch for some shapes; nothing depends on their numbers."""
    batch, rows = shapes["scores"]
    return Launch(
        kernel=select_tokens,
        inputs={
            "scores": "*fp32",
            "token_kind": "*i64",
            "slots": "*i64",
            "kept_lengths": "*i64",
        },
        integers={"rows": rows, "num_kept": shapes["slots"][1]},
        outputs={"kept_indices": "*i64"},
        constants={"block": _BLOCK},
        grid=(batch, 1, 1),
        num_warps=8,
    )
