"""Rows of a tensor, chosen per sample.

    kept[b, i] = data[b, kept_indices[b, i]]

Layouts: data [batch, rows, ...], kept [batch, num_kept, ...]; the axes after the second are one
run of `row_size` elements.

One block owns a tile of rows by columns of one sample: for wide rows one row and up to 4096
bytes of it, for positions or row kinds (one element per row) up to 256 rows. Elements are moved
as integers of their size. Every element is read once and written once: bound by bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# A kernel is decorated when its module is imported; import this one only to compile or run.
import triton
import triton.language as tl

from dllava_export.errors import BackendError
from dllava_export.plugins.compile_kernel import Launch
from dllava_export.plugins.descriptor import Shape, num_blocks

__all__ = ["launch", "tactics"]

_ELEMENT_TYPES = {
    "float16": "*i16",
    "bfloat16": "*i16",
    "float32": "*i32",
    "int32": "*i32",
    "int64": "*i64",
}
_TILE_BYTES = 4096  # 16 bytes for each thread of eight warps
_MAX_TILE_ROWS = 256


@triton.jit(do_not_specialize=["rows", "num_kept"])
def gather_tokens(
    data: tl.tensor,
    kept_indices: tl.tensor,
    rows: tl.tensor,
    num_kept: tl.tensor,
    kept: tl.tensor,
    row_size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Move one tile."""
    sample = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(2) * tile_columns + tl.arange(0, tile_columns)
    is_slot = slot < num_kept
    row = tl.load(kept_indices + sample * num_kept + slot, mask=is_slot, other=0)
    row = tl.maximum(tl.minimum(row, rows - 1), 0)  # never outside the buffer
    moved = is_slot[:, None] & (column < row_size)[None, :]
    source = data + (sample * rows + row)[:, None] * row_size + column[None, :]
    target = kept + (sample * num_kept + slot)[:, None] * row_size + column[None, :]
    tl.store(target, tl.load(source, mask=moved), mask=moved)


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
    """Return the launch for some shapes.

    Raises:
        BackendError: If an axis after the second has no fixed extent.
    """
    batch, rows, *trailing = shapes["data"]
    if not all(isinstance(extent, int) for extent in trailing):
        raise BackendError(
            f"Plugin GatherTokens: 'data' has shape {tuple(shapes['data'])}, expected fixed "
            "extents after the second axis. Fix them in the model before building."
        )
    element = _ELEMENT_TYPES[dtypes["data"]]
    row_size = math.prod(trailing)
    num_kept = shapes["kept_indices"][1]
    tile = _TILE_BYTES * 8 // int(element.removeprefix("*i"))
    tile_columns = min(triton.next_power_of_2(row_size), tile)
    tile_rows = min(tile // tile_columns, _MAX_TILE_ROWS)
    return Launch(
        kernel=gather_tokens,
        inputs={"data": element, "kept_indices": "*i64"},
        integers={"rows": rows, "num_kept": num_kept},
        outputs={"kept": element},
        constants={
            "row_size": row_size,
            "tile_rows": tile_rows,
            "tile_columns": tile_columns,
        },
        grid=(
            num_blocks(num_kept, tile_rows),
            batch,
            triton.cdiv(row_size, tile_columns),
        ),
        num_warps=8 if tile_rows * tile_columns >= tile // 2 else 1,
    )
