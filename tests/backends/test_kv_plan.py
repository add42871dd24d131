from __future__ import annotations

import pytest

from dllava_export.backends.kv_plan import (
    RESERVE_ROWS,
    SPARE_ROWS,
    bytes_per_row,
    plan_kv_cache,
)
from dllava_export.geometry import Geometry
from dllava_export.precision import FP32, NUMBER_FORMATS, Precision
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
        GEOMETRY,
        sparsity,
        Precision.of("fp16"),
        batch=2,
        num_prompt=640,
        num_kept=num_kept,
        num_new=num_new,
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
    full, sparse = 640 + num_new + SPARE_ROWS, capacity_sparse
    assert found.capacities == {"full": full, "sparse": sparse}
    assert [(group.name, group.num_layers) for group in found.groups] == [
        ("full", 2),
        ("sparse", 30),
    ]
    assert found.layer_capacities == [full] * 2 + [sparse] * 30


def test_a_dense_decoder_has_no_sparse_layers():
    found = plan(DENSE, num_kept=640)
    (group,) = found.groups
    assert (group.name, group.first_layer, group.num_layers) == ("full", 0, 32)
    assert found.capacities == {"full": 640 + 512 + SPARE_ROWS}
    assert found.num_bytes(group) == 2 * 32 * (640 + 512 + SPARE_ROWS) * BYTES_PER_ROW
    assert found.total_bytes == found.num_bytes(group)


def test_bytes_are_those_of_keys_and_values_of_the_batch():
    found = plan(HALF)
    assert found.bytes_per_row == BYTES_PER_ROW
    full, sparse = found.groups
    full_bytes = 2 * 2 * found.capacities["full"] * BYTES_PER_ROW
    sparse_bytes = 2 * 30 * found.capacities["sparse"] * BYTES_PER_ROW
    assert found.num_bytes(full) == full_bytes
    assert found.num_bytes(sparse) == sparse_bytes
    assert found.total_bytes == full_bytes + sparse_bytes


@pytest.mark.parametrize(("precision", "num_bytes"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_a_row_takes_what_the_caches_format_takes(precision, num_bytes):
    assert bytes_per_row(GEOMETRY, Precision.of(precision)) == 2 * 8 * 128 * num_bytes
    mixed = Precision(weights=FP32, activations=FP32, cache=NUMBER_FORMATS[precision])
    assert bytes_per_row(GEOMETRY, mixed) == 2 * 8 * 128 * num_bytes


def test_rows_are_counted_without_the_spare_one():
    before = plan(HALF).capacities
    assert plan(HALF).with_rows("sparse", 900).capacities == {**before, "sparse": 901}
    assert plan(HALF).with_rows("full", 900).capacities == {**before, "full": 901}
