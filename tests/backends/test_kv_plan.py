from __future__ import annotations

import pytest

from dllava_export.backends.kv_plan import RESERVE_ROWS, SPARE_ROWS, plan_kv_cache
from dllava_export.geometry import Geometry
from dllava_export.sparsity import DENSE, Sparsity

GEOMETRY = Geometry(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32000,
    num_image_tokens=576,
    predictor=None,
)
BYTES_PER_ROW = 2 * 8 * 128 * 2
HALF = Sparsity(output_text_keep_rate=0.5)
ALL_TEXT = Sparsity(output_text_keep_rate=1.0)


def plan(sparsity, num_kept=179, num_new=512):
    return plan_kv_cache(
        GEOMETRY, sparsity, batch=2, num_prompt=640, num_kept=num_kept, num_new=num_new
    )


@pytest.mark.parametrize(
    ("sparsity", "num_new", "capacity_sparse"),
    [
        pytest.param(
            HALF, 512, 179 + 256 + RESERVE_ROWS + SPARE_ROWS, id="expected + reserve"
        ),
        pytest.param(HALF, 513, 179 + 257 + RESERVE_ROWS + SPARE_ROWS, id="rounded up"),
        pytest.param(HALF, 128, 179 + 128 + SPARE_ROWS, id="reserve just fits"),
        pytest.param(HALF, 100, 179 + 100 + SPARE_ROWS, id="never more than all"),
        pytest.param(HALF, 0, 179 + SPARE_ROWS, id="no new tokens"),
        pytest.param(ALL_TEXT, 512, 179 + 512 + SPARE_ROWS, id="no keep bit"),
    ],
)
def test_sparse_layers_get_what_is_expected_to_stay(sparsity, num_new, capacity_sparse):
    found = plan(sparsity, num_new=num_new)
    assert found.capacity_sparse == capacity_sparse
    assert found.capacity_full == 640 + num_new + SPARE_ROWS
    assert (found.num_full_layers, found.num_sparse_layers) == (2, 30)


def test_a_dense_decoder_has_no_sparse_layers():
    found = plan(DENSE, num_kept=640)
    assert (found.num_full_layers, found.num_sparse_layers) == (32, 0)
    assert found.bytes_sparse == 0
    assert found.bytes_full == 2 * 32 * (640 + 512 + SPARE_ROWS) * BYTES_PER_ROW


def test_bytes_are_those_of_keys_and_values_of_the_batch():
    found = plan(HALF)
    assert found.bytes_per_row == BYTES_PER_ROW
    assert found.bytes_full == 2 * 2 * found.capacity_full * BYTES_PER_ROW
    assert found.bytes_sparse == 2 * 30 * found.capacity_sparse * BYTES_PER_ROW


def test_sparse_rows_are_counted_without_the_spare_one():
    grown = plan(HALF).with_sparse_rows(900)
    assert grown.capacity_sparse == 901
    assert grown.capacity_full == plan(HALF).capacities["full"]
