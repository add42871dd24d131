from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dllava_export.backends.trt.memory_layout import (
    ALIGNMENT,
    BlockLayout,
    TensorSpec,
    resolved_tensors,
)

INT64 = np.dtype(np.int64)
ENTRIES = [
    {"name": "inputs_embeds", "dtype": "float16", "shape": ["batch", "rows", 5]},
    {"name": "position_ids", "dtype": "int64", "shape": ["batch", "rows"]},
    {"name": "keep", "dtype": "bool", "shape": ["batch"]},
]


def test_symbolic_dimensions_become_sizes():
    tensors = resolved_tensors(ENTRIES, {"batch": 2, "rows": 3})
    assert tensors == {
        "inputs_embeds": TensorSpec(np.dtype(np.float16), (2, 3, 5)),
        "position_ids": TensorSpec(INT64, (2, 3)),
        "keep": TensorSpec(np.dtype(bool), (2,)),
    }
    assert tensors["inputs_embeds"].num_bytes == 2 * 3 * 5 * 2


def test_a_dimension_without_a_size_is_an_error():
    with pytest.raises(KeyError, match="rows"):
        resolved_tensors(ENTRIES, {"batch": 2})


def test_bfloat16_is_known_by_name():
    entries = [{"name": name, "dtype": name, "shape": [3]} for name in ("bfloat16", "float32")]
    tensors = resolved_tensors(entries, {})
    assert tensors["bfloat16"] == TensorSpec(np.dtype(ml_dtypes.bfloat16), (3,))
    assert tensors["float32"] == TensorSpec(np.dtype(np.float32), (3,))


def test_every_tensor_starts_at_a_multiple_of_256_bytes():
    layout = BlockLayout.of(resolved_tensors(ENTRIES, {"batch": 3, "rows": 67}))
    sizes = {"inputs_embeds": 3 * 67 * 5 * 2, "position_ids": 3 * 67 * 8, "keep": 3}
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
    assert list(layout.offsets.values()) == [0, padded[0], padded[0] + padded[1]]
    assert layout.num_bytes == sum(padded)
    assert layout.addresses(4096)["keep"] == 4096 + padded[0] + padded[1]


def test_views_read_and_write_the_block():
    layout = BlockLayout.of(resolved_tensors(ENTRIES, {"batch": 2, "rows": 3}))
    block = np.zeros(layout.num_bytes, np.uint8)
    views = layout.views(block)
    views["position_ids"][...] = [[1, 2, 3], [4, 5, -200]]
    views["keep"][...] = [True, False]
    start = layout.offsets["position_ids"]
    stored = block[start : start + 48].view(np.int64)
    assert stored.tolist() == [1, 2, 3, 4, 5, -200]
    assert block[layout.offsets["keep"] :].tolist() == [1] + [0] * (ALIGNMENT - 1)
    assert not block[:start].any()


def test_a_larger_block_holds_a_smaller_layout():
    block = np.full(4096, 7, np.uint8)
    layout = BlockLayout.of({"logits": TensorSpec(np.dtype(np.float32), (2, 3))})
    layout.views(block)["logits"][...] = 1
    assert block[:24].view(np.float32).tolist() == [1] * 6
    assert (block[24:] == 7).all()


def test_no_tensors_still_make_a_block():
    assert BlockLayout.of({}).num_bytes == 1
