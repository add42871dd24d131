"""Sizes at which kernels are checked and timed, with inputs, bytes and operations of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dllava_export import names

__all__ = [
    "NUMPY_DTYPES",
    "KernelCase",
    "case_work",
    "full_cases",
    "make_inputs",
    "small_cases",
]

NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
}


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One kernel at one size.

    Attributes:
        op: Name of the plugin.
        sizes: What the inputs are made from; the keys depend on the op.
        dtype: NumPy's name of the dtype of its data; scores of SelectTokens are float32 always.
        tactic: Number of the way to run it.
    """

    op: str
    sizes: Mapping[str, Any]
    dtype: str = "float32"
    tactic: int = 1

    def __str__(self) -> str:
        sizes = " ".join(f"{key}={value}" for key, value in self.sizes.items())
        return f"{self.op} {self.dtype} {sizes} tactic={self.tactic}"


def make_inputs(
    case: KernelCase, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return inputs in the descriptor's order, and attributes."""
    rng = np.random.default_rng(seed)
    return _MAKERS[case.op](rng, NUMPY_DTYPES[case.dtype], **case.sizes)


def case_work(case: KernelCase) -> tuple[int, int]:
    """Return bytes that must be read and written, and floating point operations.

    A multiply-add counts as two. A cache row counts once for each key head, an overwritten one
    not at all.
    """
    return _WORK[case.op](NUMPY_DTYPES[case.dtype].itemsize, **case.sizes)


def _select_inputs(
    rng: np.random.Generator,
    dtype: np.dtype,
    batch: int,
    rows: int,
    num_kept: int,
    distinct: int = 0,
    kinds: tuple[int, ...] = (names.PROMPT_TEXT, names.IMAGE),
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`distinct` limits the number of different scores, so that there are ties."""
    scores = rng.normal(size=(batch, rows)).astype(np.float32)
    if distinct:
        scores = (rng.integers(-distinct, distinct, scores.shape) / 2).astype(np.float32)
    lengths = rng.integers(0, num_kept + 1, batch)
    lengths[0] = num_kept
    inputs = {
        "scores": scores,
        "token_kind": rng.choice(np.array(kinds), (batch, rows)),
        "slots": np.zeros((1, num_kept), np.int64),
        "kept_lengths": lengths,
    }
    return inputs, {}


def _select_work(
    itemsize: int, batch: int, rows: int, num_kept: int, **_: object
) -> tuple[int, int]:
    return batch * (12 * rows + 8 * num_kept + 8), 0


def _gather_inputs(
    rng: np.random.Generator,
    dtype: np.dtype,
    batch: int,
    rows: int,
    num_kept: int,
    trailing: tuple[int, ...] = (),
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    shape = (batch, rows, *trailing)
    place = np.arange(math.prod(shape)).reshape(shape)
    exact = 256 if dtype == NUMPY_DTYPES["bfloat16"] else 2048  # integers a dtype holds
    data = place if dtype.kind == "i" else place % (exact - 1)
    inputs = {
        "data": data.astype(dtype),
        "kept_indices": rng.integers(0, rows, (batch, num_kept)),
    }
    return inputs, {}


def _gather_work(
    itemsize: int, batch: int, rows: int, num_kept: int, trailing: tuple[int, ...] = ()
) -> tuple[int, int]:
    return batch * num_kept * (2 * itemsize * math.prod(trailing) + 8), 0


def _predictor_inputs(
    rng: np.random.Generator,
    dtype: np.dtype,
    batch: int,
    rows: int,
    hidden_size: int,
    widths: tuple[int, int, int] = (512, 256, 128),
    spread: float = 1.0,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`spread` of the hidden states, so that LayerNorm's epsilon can matter."""
    inputs = {
        "hidden_states": spread * rng.normal(size=(batch, rows, hidden_size)),
        "norm_weight": 1 + rng.normal(size=hidden_size) / 4,
        "norm_bias": rng.normal(size=hidden_size) / 4,
    }
    ends = (hidden_size, *widths, 2)
    for i in range(4):
        inputs[f"weight_{i + 1}"] = rng.normal(size=(ends[i + 1], ends[i])) / ends[i] ** 0.5
        inputs[f"bias_{i + 1}"] = rng.normal(size=ends[i + 1]) / 4
    return {name: value.astype(dtype) for name, value in inputs.items()}, {"epsilon": 1e-5}


def _predictor_work(
    itemsize: int,
    batch: int,
    rows: int,
    hidden_size: int,
    widths: tuple[int, int, int] = (512, 256, 128),
    **_: object,
) -> tuple[int, int]:
    ends = (hidden_size, *widths, 2)
    products = sum(ends[i] * ends[i + 1] for i in range(4))
    weights = products + 2 * hidden_size + sum(ends[1:])
    num_rows = batch * rows
    return itemsize * (
        weights + num_rows * hidden_size
    ) + 8 * num_rows, 2 * num_rows * products


def _attention_inputs(
    rng: np.random.Generator,
    dtype: np.dtype,
    rows: int,
    write_index: tuple[int, ...],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
    row_lengths: tuple[int, ...] = (),
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    batch, kv_width = len(write_index), num_kv_heads * head_dim
    cache = (batch, num_kv_heads, capacity, head_dim)
    shapes = {
        "query": (batch, rows, num_heads * head_dim),
        "key": (batch, rows, kv_width),
        "value": (batch, rows, kv_width),
        "past_key": cache,
        "past_value": cache,
    }
    inputs = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    inputs["write_index"] = np.array(write_index, np.int64)
    inputs["row_lengths"] = np.array(row_lengths or [rows] * batch, np.int64)
    heads = {"num_heads": num_heads, "kv_num_heads": num_kv_heads}
    return inputs, heads | {"scale": head_dim**-0.5}


def _attention_work(
    itemsize: int,
    rows: int,
    write_index: tuple[int, ...],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
    row_lengths: tuple[int, ...] = (),
) -> tuple[int, int]:
    lengths = row_lengths or (rows,) * len(write_index)
    fed = len(write_index) * rows
    moved = 2 * num_kv_heads * (sum(write_index) + 2 * fed) + 2 * num_heads * fed
    pairs = sum(
        length * start + length * (length + 1) // 2
        for start, length in zip(write_index, lengths, strict=True)
    )
    return itemsize * head_dim * moved, 4 * head_dim * num_heads * pairs


_Maker = Callable[..., tuple[dict[str, np.ndarray], dict[str, Any]]]
_MAKERS: dict[str, _Maker] = {
    "SelectTokens": _select_inputs,
    "GatherTokens": _gather_inputs,
    "PredictorHead": _predictor_inputs,
    "KVCacheAttention": _attention_inputs,
}
_WORK: dict[str, Callable[..., tuple[int, int]]] = {
    "SelectTokens": _select_work,
    "GatherTokens": _gather_work,
    "PredictorHead": _predictor_work,
    "KVCacheAttention": _attention_work,
}

_PADDED = (names.PADDING, names.PROMPT_TEXT, names.IMAGE, names.GENERATED_TEXT)


def small_cases(op: str) -> list[KernelCase]:
    """Return sizes that Triton's interpreter runs in a second or so: edges and odd numbers."""
    return _SMALL[op]()


def full_cases(op: str) -> list[KernelCase]:
    """Return sizes of a 7B model: 32 heads of 128, hidden size 4096, 576 image rows of 640.

    Decode of one and eight samples, at 256 and 2048 cache rows, prefill before and after the
    selection; and a model with 4 query heads to a key head.
    """
    return _FULL[op]()


def _small_select() -> list[KernelCase]:
    sizes: list[dict[str, Any]] = [
        {"batch": 1, "rows": 1, "num_kept": 1, "kinds": (names.GENERATED_TEXT,)},
        {"batch": 1, "rows": 1, "num_kept": 1, "kinds": (names.IMAGE,)},
        {"batch": 3, "rows": 7, "num_kept": 4, "kinds": _PADDED},
        {"batch": 2, "rows": 40, "num_kept": 40, "kinds": _PADDED},
        {"batch": 3, "rows": 33, "num_kept": 9, "distinct": 2, "kinds": (names.IMAGE,)},
        {"batch": 2, "rows": 640, "num_kept": 179, "distinct": 40},
        {"batch": 2, "rows": 1030, "num_kept": 1027, "distinct": 3, "kinds": _PADDED},
        {"batch": 1, "rows": 4096, "num_kept": 820},
    ]
    return [KernelCase("SelectTokens", size) for size in sizes]


def _small_gather() -> list[KernelCase]:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch": 1, "rows": 1, "num_kept": 1}, "int64"),
        ({"batch": 2, "rows": 640, "num_kept": 300}, "int64"),
        ({"batch": 2, "rows": 5, "num_kept": 3}, "int32"),
        ({"batch": 2, "rows": 5, "num_kept": 0, "trailing": (8,)}, "float16"),
        ({"batch": 3, "rows": 6, "num_kept": 5, "trailing": (7,)}, "float32"),
        ({"batch": 2, "rows": 9, "num_kept": 4, "trailing": (2600,)}, "float16"),
        ({"batch": 2, "rows": 9, "num_kept": 4, "trailing": (3, 40)}, "bfloat16"),
        ({"batch": 1, "rows": 9, "num_kept": 12, "trailing": (128,)}, "float32"),
    ]
    return [KernelCase("GatherTokens", size, dtype) for size, dtype in cases]


def _small_predictor() -> list[KernelCase]:
    tiny: dict[str, Any] = {"hidden_size": 8, "widths": (2, 2, 2)}
    odd: dict[str, Any] = {"hidden_size": 72, "widths": (48, 20, 17)}
    wide: dict[str, Any] = {"hidden_size": 320, "widths": (512, 256, 128)}
    cases: list[tuple[dict[str, Any], str, int]] = [
        ({"batch": 1, "rows": 1, **tiny}, "float32", 1),
        ({"batch": 2, "rows": 3, **tiny}, "float16", 2),
        ({"batch": 3, "rows": 1, **odd, "spread": 1e-3}, "float32", 1),
        ({"batch": 1, "rows": 19, **odd}, "float32", 2),
        ({"batch": 1, "rows": 2, **odd}, "bfloat16", 1),
        ({"batch": 2, "rows": 0, **tiny}, "float32", 1),
        ({"batch": 1, "rows": 1, **wide}, "float16", 1),
        ({"batch": 1, "rows": 17, **wide}, "float16", 2),
    ]
    return [KernelCase("PredictorHead", *case) for case in cases]


def _attention_case(
    dtype: str, heads: tuple[int, int, int], rows: int, write_index: tuple[int, ...],
    capacity: int, tactic: int, row_lengths: tuple[int, ...] = (),
) -> KernelCase:  # fmt: skip
    sizes: dict[str, Any] = {"rows": rows, "write_index": write_index}
    sizes |= dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    sizes |= {"capacity": capacity, "row_lengths": row_lengths}
    return KernelCase("KVCacheAttention", sizes, dtype, tactic)


def _small_attention() -> list[KernelCase]:
    mha, gqa, odd = (2, 2, 32), (4, 2, 16), (6, 2, 80)
    return [
        # Decode: empty cache, different lengths, the spare row, a finished sample.
        _attention_case("float32", mha, 1, (0,), 4, 1),
        _attention_case("float32", mha, 1, (3, 300), 301, 1),
        _attention_case("float16", (2, 2, 80), 1, (8, 7), 9, 1, (1, 0)),
        _attention_case("bfloat16", (1, 1, 96), 1, (5,), 9, 1),
        _attention_case("float32", gqa, 1, (3, 70), 71, 2),
        _attention_case("float16", odd, 1, (33, 0), 40, 2, (1, 1)),
        _attention_case("bfloat16", (1, 1, 64), 1, (50,), 64, 2),
        # Prefill, and several rows on a filled cache.
        _attention_case("float32", mha, 5, (0, 0), 9, 1),
        _attention_case("float32", mha, 37, (0, 0), 40, 2, (37, 20)),
        _attention_case("float32", (4, 4, 4), 37, (3, 40), 80, 3),
        _attention_case("float32", odd, 21, (5, 17), 40, 3),
        _attention_case("float16", gqa, 67, (0, 2), 70, 3, (67, 1)),
        _attention_case("bfloat16", (1, 1, 128), 70, (10,), 80, 3),
        # More rows than fit: what does not fit is not stored.
        _attention_case("float32", mha, 6, (2,), 5, 2),
    ]


def _full_select() -> list[KernelCase]:
    return [
        KernelCase("SelectTokens", {"batch": b, "rows": r, "num_kept": k})
        for b, r, k in ((1, 640, 179), (8, 640, 179), (1, 4096, 820), (8, 1, 1))
    ]


def _full_gather() -> list[KernelCase]:
    rows = {"rows": 640, "num_kept": 179}
    wide = [
        KernelCase("GatherTokens", {"batch": b, **rows, "trailing": (4096,)}, dtype)
        for b in (1, 8)
        for dtype in ("float16", "bfloat16", "float32")
    ]
    return [*wide, KernelCase("GatherTokens", {"batch": 8, **rows}, "int64")]


def _full_predictor() -> list[KernelCase]:
    return [
        KernelCase(
            "PredictorHead", {"batch": b, "rows": r, "hidden_size": 4096}, dtype, tactic
        )
        for dtype in ("float16", "float32")
        for b, r, tactic in ((1, 1, 1), (8, 1, 1), (8, 1, 2), (1, 256, 2))
    ]


def _full_attention() -> list[KernelCase]:
    cases = []
    for dtype in NUMPY_DTYPES:
        if dtype.startswith("int"):
            continue
        for heads, tactics in (((32, 32, 128), (1, 2)), ((32, 8, 128), (2,))):
            for batch in (1, 8):
                for length in (256, 2048):
                    at = (length,) * batch
                    cases += [_attention_case(dtype, heads, 1, at, 2100, t) for t in tactics]
            cases += [_attention_case(dtype, heads, n, (0,), 2100, 3) for n in (179, 640)]
    for head_dim in (64, 80, 96):
        cases.append(_attention_case("float16", (32, 32, head_dim), 1, (2048,), 2100, 1))
        cases.append(_attention_case("float16", (32, 32, head_dim), 640, (0,), 2100, 3))
    return cases


_SMALL: dict[str, Callable[[], list[KernelCase]]] = {
    "SelectTokens": _small_select,
    "GatherTokens": _small_gather,
    "PredictorHead": _small_predictor,
    "KVCacheAttention": _small_attention,
}
_FULL: dict[str, Callable[[], list[KernelCase]]] = {
    "SelectTokens": _full_select,
    "GatherTokens": _full_gather,
    "PredictorHead": _full_predictor,
    "KVCacheAttention": _full_attention,
}
