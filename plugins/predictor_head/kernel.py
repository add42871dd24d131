"""The output-text predictor: LayerNorm, four linear layers, the decision to keep a row.

    logits = W4 gelu(W3 gelu(W2 gelu(W1 norm(x) + b1) + b2) + b3) + b4
    scores, keep = logits[0], logits[0] > logits[1]

Layouts: hidden_states [batch, rows, hidden_size], weights [out, in], scores and keep [batch,
rows].

One block owns a tile of rows and does all of it, in float32. It walks over layer 1 in chunks of
outputs: a chunk is finished, then added to all outputs of layer 2 at once, so no layer's
result but the second's is ever held whole, and every weight is read once per block. Layers 3 and
4 are chained in the same way. Weights come from memory or L2: 2.3 million of them for
a 7B model, 4.5 MB in float16. In decode a block reads them alone, with the loads of one
multiprocessor: bound by those. For many rows they are read once per 16 rows.
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
from dllava_export.plugins.predictor_head.descriptor import DESCRIPTOR

__all__ = ["launch", "tactics"]

_ONE_ROW, _TILE = 1, 2
_TILE_ROWS = {_ONE_ROW: 1, _TILE: 16}
_MIN_BLOCK = 16  # of a matrix product
_MAX_WIDTH = 512  # of layer 2, whose outputs a block holds


@triton.jit
def _gelu(x: tl.tensor) -> tl.tensor:
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _product(x: tl.tensor, weight: tl.tensor, tile_rows: tl.constexpr) -> tl.tensor:
    """Return x [tile_rows, in] times weight [out, in] transposed, in float32."""
    if tile_rows == 1:
        return tl.sum(x * weight, 1)[None, :]
    return tl.dot(x, tl.trans(weight), input_precision="ieee")


@triton.jit
def _matrix(
    pointer: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    num_rows: tl.constexpr,
    num_columns: tl.constexpr,
) -> tl.tensor:
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    at = row[:, None] * num_columns + column[None, :]
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vector(pointer: tl.tensor, at: tl.tensor, size: tl.constexpr) -> tl.tensor:
    return tl.load(pointer + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def _hidden(
    hidden_states: tl.tensor,
    row: tl.tensor,
    num_rows: tl.tensor,
    column: tl.tensor,
    hidden_size: tl.constexpr,
) -> tl.tensor:
    inside = (row < num_rows)[:, None] & (column < hidden_size)[None, :]
    at = row.to(tl.int64)[:, None] * hidden_size + column[None, :]
    return tl.load(hidden_states + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def predictor_head(
    hidden_states: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    weight_1: tl.tensor,
    bias_1: tl.tensor,
    weight_2: tl.tensor,
    bias_2: tl.tensor,
    weight_3: tl.tensor,
    bias_3: tl.tensor,
    weight_4: tl.tensor,
    bias_4: tl.tensor,
    num_rows: tl.tensor,
    scores: tl.tensor,
    keep: tl.tensor,
    epsilon: tl.constexpr,
    hidden_size: tl.constexpr,
    width_1: tl.constexpr,
    width_2: tl.constexpr,
    width_3: tl.constexpr,
    padded_2: tl.constexpr,
    tile_rows: tl.constexpr,
    block_in: tl.constexpr,
    block_out: tl.constexpr,
) -> None:
    """Score one tile of rows; `num_rows` counts those of all samples."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    lane = tl.arange(0, block_in)
    total = tl.zeros((tile_rows, block_in), tl.float32)
    for first in range(0, hidden_size, block_in):
        total += _hidden(hidden_states, row, num_rows, first + lane, hidden_size)
    mean = tl.sum(total, 1) / hidden_size
    squares = tl.zeros((tile_rows, block_in), tl.float32)
    for first in range(0, hidden_size, block_in):
        column = first + lane
        x = _hidden(hidden_states, row, num_rows, column, hidden_size) - mean[:, None]
        squares += tl.where((column < hidden_size)[None, :], x * x, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(squares, 1) / hidden_size + epsilon)

    at_2 = tl.arange(0, padded_2)
    linear_2 = tl.zeros((tile_rows, padded_2), tl.float32)
    for start in range(0, width_1, block_out):
        at_1 = start + tl.arange(0, block_out)
        linear_1 = tl.zeros((tile_rows, block_out), tl.float32)
        for first in range(0, hidden_size, block_in):
            column = first + lane
            x = _hidden(hidden_states, row, num_rows, column, hidden_size)
            x = (x - mean[:, None]) * inverse[:, None]
            x *= _vector(norm_weight, column, hidden_size)[None, :]
            x += _vector(norm_bias, column, hidden_size)[None, :]
            weight = _matrix(weight_1, at_1, column, width_1, hidden_size)
            linear_1 += _product(x, weight, tile_rows)
        gelu_1 = _gelu(linear_1 + _vector(bias_1, at_1, width_1)[None, :])
        weight = _matrix(weight_2, at_2, at_1, width_2, width_1)
        linear_2 += _product(gelu_1, weight, tile_rows)
    gelu_2 = _gelu(linear_2 + _vector(bias_2, at_2, width_2)[None, :])

    keep_logit = tl.zeros((tile_rows,), tl.float32)
    drop_logit = tl.zeros((tile_rows,), tl.float32)
    for start in range(0, width_3, block_out):
        at_3 = start + tl.arange(0, block_out)
        weight = _matrix(weight_3, at_3, at_2, width_3, width_2)
        linear_3 = _product(gelu_2, weight, tile_rows)
        gelu_3 = _gelu(linear_3 + _vector(bias_3, at_3, width_3)[None, :])
        keep_logit += tl.sum(gelu_3 * _vector(weight_4, at_3, width_3)[None, :], 1)
        drop_row = _vector(weight_4 + width_3, at_3, width_3)
        drop_logit += tl.sum(gelu_3 * drop_row[None, :], 1)
    keep_logit += tl.load(bias_4).to(tl.float32)
    drop_logit += tl.load(bias_4 + 1).to(tl.float32)
    tl.store(scores + row, keep_logit, mask=row < num_rows)
    tl.store(keep + row, (keep_logit > drop_logit).to(tl.int32), mask=row < num_rows)


def tactics(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str], attributes: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the numbers of the ways to run it: a block per row, or per 16 rows."""
    return (_ONE_ROW, _TILE)


def launch(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
    attributes: Mapping[str, Any],
    tactic: int,
) -> Launch:
    """Return the launch for some shapes.

    Raises:
        BackendError: If the widths do not fit each other or the kernel.
    """
    batch, rows, hidden_size = shapes["hidden_states"]
    widths = _widths(shapes)
    tile_rows = _TILE_ROWS[tactic]
    num_rows = batch * rows
    return Launch(
        kernel=predictor_head,
        inputs={spec.name: POINTER_TYPES[dtypes[spec.name]] for spec in DESCRIPTOR.inputs},
        integers={"num_rows": num_rows},
        outputs={"scores": "*fp32", "keep": "*i32"},
        constants={
            "epsilon": attributes["epsilon"],
            "hidden_size": hidden_size,
            "width_1": widths[0],
            "width_2": widths[1],
            "width_3": widths[2],
            "padded_2": max(triton.next_power_of_2(widths[1]), _MIN_BLOCK),
            "tile_rows": tile_rows,
            "block_in": 256 if tile_rows == 1 else 32,
            "block_out": _MIN_BLOCK,
        },
        grid=(num_blocks(num_rows, tile_rows), 1, 1),
        num_warps=8,
    )


def _widths(shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
    """Return the widths of the three hidden layers."""
    hidden_size = shapes["hidden_states"][2]
    weights = [tuple(shapes[f"weight_{i}"]) for i in (1, 2, 3, 4)]
    widths = [hidden_size, *(shape[0] for shape in weights)]
    expected = [(widths[i + 1], widths[i]) for i in range(4)]
    fixed = all(isinstance(width, int) for width in widths)
    if not fixed or weights != expected or widths[4] != 2 or widths[2] > _MAX_WIDTH:
        raise BackendError(
            f"Plugin PredictorHead: hidden size {hidden_size} and weights {weights}, expected "
            "fixed extents [out, in] that follow each other, at most "
            f"{_MAX_WIDTH} outputs of layer 2 and 2 of layer 4. Remove the plugin from the "
            "build, so that the op's body is used."
        )
    return widths[1], widths[2], widths[3]
