"""Append keys and values to the cache and attend to the sample's rows, in one kernel.

    present[b, h, write_index[b] + i] = key[b, i, h]
    output[b, i] = softmax(scale * query[b, i] . rows 0 to write_index[b] + i) over those rows

Layouts: query and output [batch, rows, num_heads * head_dim], key and value [batch, rows,
num_kv_heads * head_dim], caches [batch, num_kv_heads, capacity, head_dim].

A block owns a tile of rows of one sample and one key head with all query heads that share it. It
stores the keys and values of its rows. Blocks run in any order, so rows of this launch are
read from `key` and `value`, and only rows below `write_index` from the cache: no block reads
what another one writes. Softmax is online, in float32.

Two ways to run it. By tile: query rows and heads fill a matrix product's left side; bound by
arithmetic in prefill. One row (num_heads == num_kv_heads): every lane of cache rows keeps a
softmax of its own, combined once at the end, so the loop over the cache neither waits nor
reduces over warps. In decode the cache is read once, 2 * head_dim elements per row and key head:
bound by bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A kernel is decorated when its module is imported; import this one only to compile or run.
import triton
import triton.language as tl

from dllava_export.errors import BackendError
from dllava_export.plugins.compile_kernel import POINTER_TYPES, Launch
from dllava_export.plugins.descriptor import Shape, num_blocks

__all__ = ["launch", "tactics"]

_LOG2_E = 1.4426950408889634
_ONE_ROW = 1
# By tactic: rows of the matrix product, warps, pipeline stages. Tactic 4 has no room for a
# second stage in 48 KiB of shared memory.
_TILES = {2: (16, 4, 2), 3: (32, 8, 2), 4: (64, 8, 1)}
_MIN_BLOCK = 16  # of a matrix product
_MAX_HEAD_DIM = 128


@triton.jit
def _append(
    new: tl.tensor,
    present: tl.tensor,
    row: tl.tensor,
    past_rows: tl.tensor,
    rows: tl.tensor,
    capacity: tl.tensor,
    dim: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
) -> None:
    """Store rows of one head; `new` and `present` point to the head's first element."""
    fits = (row < rows) & (past_rows + row < capacity)
    moved = fits[:, None] & (dim < head_dim)[None, :]
    source = new + row[:, None] * (num_kv_heads * head_dim) + dim[None, :]
    target = present + (past_rows + row)[:, None] * head_dim + dim[None, :]
    tl.store(target, tl.load(source, mask=moved), mask=moved)


@triton.jit
def _one_row_step(
    query: tl.tensor,
    key_at: tl.tensor,
    value_at: tl.tensor,
    visible: tl.tensor,
    inside: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    attended: tl.tensor,
    scale: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add one row to the softmax of every lane."""
    key = tl.load(key_at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_at, mask=inside, other=0.0).to(tl.float32)
    score = tl.where(visible, tl.sum(query * key, 1) * scale, -1.0e30)
    new_largest = tl.maximum(largest, score)
    shrink = tl.exp2(largest - new_largest)
    weight = tl.where(visible, tl.exp2(score - new_largest), 0.0)
    attended = attended * shrink[:, None] + weight[:, None] * value
    return new_largest, total * shrink + weight, attended


@triton.jit(do_not_specialize=["rows", "capacity"])
def attend_one_row(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    past_key: tl.tensor,
    past_value: tl.tensor,
    write_index: tl.tensor,
    row_lengths: tl.tensor,
    rows: tl.tensor,
    capacity: tl.tensor,
    output: tl.tensor,
    present_key: tl.tensor,
    present_value: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    scale: tl.constexpr,
    block_keys: tl.constexpr,
) -> None:
    """Attend with one query row of one head; `scale` includes log2(e)."""
    row, head = tl.program_id(0), tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    past_rows = tl.load(write_index + sample).to(tl.int32)
    is_valid = row < tl.load(row_lengths + sample).to(tl.int32)
    row_stride: tl.constexpr = num_kv_heads * head_dim
    first_new = sample * rows * row_stride + head * head_dim
    cache = (sample * num_kv_heads + head) * capacity * head_dim
    dim = tl.arange(0, padded_dim)
    is_dim = (dim < head_dim)[None, :]
    one = row + tl.arange(0, 1)
    _append(key + first_new, present_key + cache, one, past_rows, rows, capacity, dim,
            num_kv_heads, head_dim)  # fmt: skip
    _append(value + first_new, present_value + cache, one, past_rows, rows, capacity, dim,
            num_kv_heads, head_dim)  # fmt: skip

    at = first_new + row * row_stride + dim[None, :]
    q = tl.load(query + at, mask=is_dim, other=0.0).to(tl.float32)
    lane = tl.arange(0, block_keys)
    largest = tl.full((block_keys,), -1.0e30, tl.float32)
    total = tl.zeros((block_keys,), tl.float32)
    attended = tl.zeros((block_keys, padded_dim), tl.float32)
    for first in range(0, tl.where(is_valid, past_rows, 0), block_keys):
        column = first + lane
        visible = column < past_rows
        offset = cache + column[:, None] * head_dim + dim[None, :]
        largest, total, attended = _one_row_step(
            q, past_key + offset, past_value + offset, visible, visible[:, None] & is_dim,
            largest, total, attended, scale,
        )  # fmt: skip
    for first in range(0, tl.where(is_valid, row + 1, 0), block_keys):
        column = first + lane
        visible = column <= row
        offset = first_new + column[:, None] * row_stride + dim[None, :]
        largest, total, attended = _one_row_step(
            q, key + offset, value + offset, visible, visible[:, None] & is_dim,
            largest, total, attended, scale,
        )  # fmt: skip

    share = tl.exp2(largest - tl.max(largest, 0))
    divisor = tl.where(is_valid, tl.sum(total * share, 0), 1.0)  # padding attends to nothing
    result = tl.sum(attended * share[:, None], 0) / divisor
    tl.store(output + at, result[None, :].to(output.dtype.element_ty), mask=is_dim)


@triton.jit
def _tile_step(
    query: tl.tensor,
    key_at: tl.tensor,
    value_at: tl.tensor,
    inside: tl.tensor,
    visible: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    attended: tl.tensor,
    scale: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a block of rows to the softmax of every query row; one at least must be visible."""
    key = tl.load(key_at, mask=inside, other=0.0)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    score = tl.where(visible, score, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(score, 1))
    shrink = tl.exp2(largest - new_largest)
    weight = tl.exp2(score - new_largest[:, None])
    value = tl.load(value_at, mask=inside, other=0.0)
    attended = attended * shrink[:, None]
    attended = tl.dot(weight.to(value.dtype), value, attended, input_precision="ieee")
    return new_largest, total * shrink + tl.sum(weight, 1), attended


@triton.jit(do_not_specialize=["rows", "capacity"])
def attend_tile(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    past_key: tl.tensor,
    past_value: tl.tensor,
    write_index: tl.tensor,
    row_lengths: tl.tensor,
    rows: tl.tensor,
    capacity: tl.tensor,
    output: tl.tensor,
    present_key: tl.tensor,
    present_value: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    scale: tl.constexpr,
    tile_rows: tl.constexpr,
    block_keys: tl.constexpr,
) -> None:
    """Attend with a tile of query rows and the heads of one group; `scale` has log2(e)."""
    first_row, head = tl.program_id(0) * tile_rows, tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    past_rows = tl.load(write_index + sample).to(tl.int32)
    valid_rows = tl.load(row_lengths + sample).to(tl.int32)
    row_stride: tl.constexpr = num_kv_heads * head_dim
    first_new = sample * rows * row_stride + head * head_dim
    cache = (sample * num_kv_heads + head) * capacity * head_dim
    dim = tl.arange(0, padded_dim)
    is_dim = (dim < head_dim)[None, :]
    own = first_row + tl.arange(0, tile_rows)
    _append(key + first_new, present_key + cache, own, past_rows, rows, capacity, dim,
            num_kv_heads, head_dim)  # fmt: skip
    _append(value + first_new, present_value + cache, own, past_rows, rows, capacity, dim,
            num_kv_heads, head_dim)  # fmt: skip

    packed = tl.arange(0, tile_rows * padded_group)
    row, member = first_row + packed // padded_group, packed % padded_group
    is_query = ((row < rows) & (member < group))[:, None] & is_dim
    at = (sample * rows + row) * row_stride * group + (head * group + member) * head_dim
    at = at[:, None] + dim[None, :]
    q = tl.load(query + at, mask=is_query, other=0.0)
    lane = tl.arange(0, block_keys)
    largest = tl.full((tile_rows * padded_group,), float("-inf"), tl.float32)
    total = tl.zeros((tile_rows * padded_group,), tl.float32)
    attended = tl.zeros((tile_rows * padded_group, padded_dim), tl.float32)
    is_needed = first_row < valid_rows
    for first in range(0, tl.where(is_needed, past_rows, 0), block_keys):
        column = first + lane
        is_past = column < past_rows
        offset = cache + column[:, None] * head_dim + dim[None, :]
        largest, total, attended = _tile_step(
            q, past_key + offset, past_value + offset, is_past[:, None] & is_dim,
            is_past[None, :], largest, total, attended, scale,
        )  # fmt: skip
    end = tl.minimum(first_row + tile_rows, rows)
    for first in range(0, tl.where(is_needed, end, 0), block_keys):
        column = first + lane
        offset = first_new + column[:, None] * row_stride + dim[None, :]
        largest, total, attended = _tile_step(
            q, key + offset, value + offset, (column < end)[:, None] & is_dim,
            column[None, :] <= row[:, None], largest, total, attended, scale,
        )  # fmt: skip

    divisor = tl.where(is_needed, total, 1.0)
    result = tl.where((row < valid_rows)[:, None], attended / divisor[:, None], 0.0)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=is_query)


def tactics(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str], attributes: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the numbers of the ways to run it.

    Decode is fastest by one row or the smallest tile, prefill by a larger one: TensorRT times
    them for each profile. All of them are right for any number of rows. One row needs a key head
    per query head; the largest tile does not fit the registers in float32.
    """
    one_row = (_ONE_ROW,) if attributes["num_heads"] == attributes["kv_num_heads"] else ()
    tiles = (2, 3) if dtypes["query"] == "float32" else (2, 3, 4)
    return (*one_row, *tiles)


def launch(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
    attributes: Mapping[str, Any],
    tactic: int,
) -> Launch:
    """Return the launch for some shapes.

    Raises:
        BackendError: If heads, widths and dtypes do not fit each other or the kernels.
    """
    num_kv_heads, head_dim = _checked_heads(shapes, dtypes, attributes)
    batch, rows, _ = shapes["query"]
    pointer = POINTER_TYPES[dtypes["query"]]
    floats = ("query", "key", "value", "past_key", "past_value")
    constants = {
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "padded_dim": max(triton.next_power_of_2(head_dim), _MIN_BLOCK),
        "scale": attributes["scale"] * _LOG2_E,
    }
    if tactic == _ONE_ROW:
        kernel, tile_rows, num_warps, num_stages = attend_one_row, 1, 8, 1
        constants["block_keys"] = min(8192 // constants["padded_dim"], 128)
    else:
        tile, num_warps, num_stages = _TILES[tactic]
        group = attributes["num_heads"] // num_kv_heads
        padded_group = triton.next_power_of_2(group)
        kernel, tile_rows = attend_tile, max(tile // padded_group, 1)
        constants |= {"group": group, "padded_group": padded_group, "tile_rows": tile_rows}
        constants["block_keys"] = 16 if dtypes["query"] == "float32" else 32
    return Launch(
        kernel=kernel,
        inputs=dict.fromkeys(floats, pointer) | {"write_index": "*i64", "row_lengths": "*i64"},
        integers={"rows": rows, "capacity": shapes["past_key"][2]},
        outputs=dict.fromkeys(("output", "present_key", "present_value"), pointer),
        constants={name: constants[name] for name in kernel.arg_names if name in constants},
        grid=(num_blocks(rows, tile_rows), num_kv_heads, batch),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _checked_heads(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str], attributes: Mapping[str, Any]
) -> tuple[int, int]:
    """Return num_kv_heads and head_dim."""
    num_heads, num_kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    head_dim = shapes["past_key"][3]
    widths = [shapes[name][2] for name in ("query", "key", "value")]
    expected = [head_dim * heads for heads in (num_heads, num_kv_heads, num_kv_heads)]
    used = {dtypes[n] for n in ("query", "key", "value", "past_key", "past_value")}
    if (
        num_heads % num_kv_heads
        or not isinstance(head_dim, int)
        or head_dim > _MAX_HEAD_DIM
        or widths != expected
        or len(used) > 1
    ):
        raise BackendError(
            f"Plugin KVCacheAttention: {num_heads} heads over {num_kv_heads} key heads of "
            f"{head_dim}, widths {widths}, dtypes {sorted(used)}; expected a multiple of key "
            f"heads, a fixed head_dim of at most {_MAX_HEAD_DIM}, widths {expected} and one "
            "dtype. Remove the plugin from the build, so that the op's body is used."
        )
    return num_kv_heads, head_dim
