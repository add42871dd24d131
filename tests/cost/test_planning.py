from __future__ import annotations

import json

import pytest
from counted_bundle import GEOMETRY, HIDDEN, NUM_IMAGE, VOCAB, WIDE, make_counted_bundle

from dllava_export.cost.planning import ASSUMPTIONS, RUNTIME_BYTES, PlanRequest, plan_memory
from dllava_export.errors import BundleError
from dllava_export.precision import Precision
from dllava_export.sparsity import DENSE

# One sample of 20 prompt rows and 400 new tokens, counted by hand. A cache row of one layer is
# a key and a value of 4 in float16.
ROW = 2 * 4 * 2
FULL_ROWS = 20 + 400 + 1
SPARSE_ROWS = (20 - 6 + 2) + (200 + 64) + 1
ENDS = 20 * HIDDEN * 2 + 20 * 8 + VOCAB * 2 + NUM_IMAGE * 5 * 2 + NUM_IMAGE * HIDDEN * 2
ACTIVE = 2 * 20 * WIDE * 2 + NUM_IMAGE * HIDDEN * 2
WEIGHTS = (HIDDEN * WIDE + WIDE * VOCAB) * 2 + 5 * HIDDEN * 2
PREDICTOR = WIDE * 3 * 4
DENSE_SAMPLE = 2 * FULL_ROWS * ROW + ACTIVE + ENDS
SPARSE_SAMPLE = (FULL_ROWS + SPARSE_ROWS) * ROW + ACTIVE + ENDS
SPARSE_FIXED = WEIGHTS + PREDICTOR + RUNTIME_BYTES
GIB = 2**30


@pytest.fixture
def folder(tmp_path):
    make_counted_bundle(tmp_path / "out")
    return tmp_path / "out"


def plan(folder, gpu_memory=GIB, max_input_len=20, max_new_tokens=400, **settings):
    return plan_memory(
        folder, PlanRequest(gpu_memory, max_input_len, max_new_tokens, **settings)
    )


def test_counts_both_forms(folder):
    found = plan(folder, batch_size=3)
    sparse, dense = found.sparse, found.dense
    assert sparse.kv_plan.capacities == {"full": FULL_ROWS, "sparse": SPARSE_ROWS}
    assert sparse.weights == WEIGHTS + PREDICTOR
    assert sparse.per_sample == SPARSE_SAMPLE
    assert sparse.total == SPARSE_FIXED + 3 * SPARSE_SAMPLE
    assert dense.kv_plan.capacities == {"full": FULL_ROWS}
    assert dense.total == WEIGHTS + RUNTIME_BYTES + 3 * DENSE_SAMPLE
    assert found.embedding == VOCAB * HIDDEN * 2
    assert found.stored_scores == GEOMETRY.num_heads * 20 * 420 * 2


@pytest.mark.parametrize("spare", [0, SPARSE_SAMPLE - 1])
def test_largest_batch_fits_exactly(folder, spare):
    found = plan(folder, SPARSE_FIXED + 7 * SPARSE_SAMPLE + spare)
    assert found.sparse.largest_batch == 7
    dense_room = SPARSE_FIXED + 7 * SPARSE_SAMPLE + spare - WEIGHTS - RUNTIME_BYTES
    assert found.dense.largest_batch == dense_room // DENSE_SAMPLE < 7


def test_a_dense_form_may_not_fit_at_all(folder):
    found = plan(folder, SPARSE_FIXED + SPARSE_SAMPLE)
    assert (found.dense.largest_batch, found.sparse.largest_batch) == (0, 1)


def test_a_prompt_without_an_image_keeps_all_rows(folder):
    found = plan(folder, image_tokens=0, max_new_tokens=10)
    assert found.sparse.kv_plan.capacities == {"full": 31, "sparse": 31}


def test_a_dense_bundle_equals_its_dense_form(tmp_path):
    make_counted_bundle(tmp_path, sparsity=DENSE)
    found = plan(tmp_path)
    assert found.sparse == found.dense
    assert "cache rows, layers 0 to 1" in found.to_text()
    assert "predictor" not in found.to_text().split("Assumed")[0]


def test_text(folder):
    lines = plan(folder, batch_size=3).to_text().splitlines()
    assert lines[:3] == [
        "Request   20 prompt tokens, 6 of them of an image, and 400 new ones; batch 3",
        "GPU       1.00 GiB",
        "Host      800 bytes of token embeddings",
    ]
    words = [" ".join(line.split()) for line in lines]
    assert "cache rows, layers 1 to 1 421 281 66.7%" in words
    assert "predictor weights 0 bytes 384 bytes -" in words
    assert "KV cache, layers 0 to 0 19.7 KiB 19.7 KiB 100.0%" in words
    assert "CUDA context, kernels 512.0 MiB 512.0 MiB 100.0%" in words
    largest = (GIB - SPARSE_FIXED) // SPARSE_SAMPLE
    assert f"A batch of 3 fits in 1.00 GiB, the largest is {largest}." in lines
    assert lines[-len(ASSUMPTIONS) - 1 : -1] == [f"  {line}" for line in ASSUMPTIONS]
    table = lines[4 : lines.index("", 4)]
    assert len({len(line) for line in table}) == 1


def test_text_says_that_a_batch_does_not_fit(folder):
    text = plan(folder, SPARSE_FIXED + 7 * SPARSE_SAMPLE, batch_size=8).to_text()
    assert "A batch of 8 does not fit: 512.1 MiB of 512.1 MiB. The largest is 7." in text


def test_json(folder):
    report = json.loads(json.dumps(plan(folder, batch_size=3).to_json()))
    assert report["request"]["image_tokens"] == NUM_IMAGE
    groups = [("full", 0, 1, FULL_ROWS), ("sparse", 1, 1, SPARSE_ROWS)]
    assert report["sparse"]["cache_groups"] == [
        {"name": name, "first_layer": first, "num_layers": count, "capacity": rows}
        | {"bytes": 3 * rows * ROW}
        for name, first, count, rows in groups
    ]
    (dense,) = report["dense"]["cache_groups"]
    assert (dense["name"], dense["num_layers"], dense["capacity"]) == ("full", 2, FULL_ROWS)
    assert dense["bytes"] == 3 * 2 * FULL_ROWS * ROW
    sizes = report["sparse"]["bytes"]
    assert sizes["kv_cache"] == 3 * (FULL_ROWS + SPARSE_ROWS) * ROW
    parts = [sizes[name] for name in sizes if name not in ("total", "per_sample")]
    assert sum(parts) == sizes["total"] == SPARSE_FIXED + 3 * SPARSE_SAMPLE
    assert report["sparse"]["fits"] is True
    assert report["host_bytes"]["embedding"] == VOCAB * HIDDEN * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"max_input_len": 6}, r"counts the image too, whose tokens are 6; expected "
                     r"at least 7, got 6\. Add the 6", id="no room for text"),
        pytest.param({"max_new_tokens": 4077}, r"max_input_len 20 and max_new_tokens 4077 are "
                     r"4097 tokens together; the model was made for at most 4096\.",
                     id="beyond the context"),
        pytest.param({"gpu_memory": SPARSE_FIXED}, r"gpu_memory is 512\.0 MiB, but the weights of "
                     r".*out take 4\.1 KiB \(decoder 3\.6 KiB, predictors 384 bytes, vision 80 "
                     r"bytes\) in fp16, and the runtime about 512\.0 MiB\. Take a GPU with more "
                     r"than 512\.0 MiB\.", id="weights do not fit"),
        pytest.param({"gpu_memory": SPARSE_FIXED + SPARSE_SAMPLE - 1},
                     r"but one sample needs 512\.0 MiB: 4\.1 KiB of weights, about 512\.0 MiB of "
                     r"runtime, and 14\.\d KiB of KV cache and activations\. Take a GPU with",
                     id="no sample fits"),
    ],
)  # fmt: skip
def test_requests_that_do_not_fit(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(folder, **settings)


def test_advises_a_smaller_type(tmp_path):
    make_counted_bundle(tmp_path, precision=Precision.of("fp32"))
    with pytest.raises(ValueError, match="or export with --precision fp16"):
        plan(tmp_path, gpu_memory=1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_memory": 0}, "gpu_memory must be at least 1, got 0"),
        ({"max_input_len": 0}, "max_input_len must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"image_tokens": -1}, "image_tokens must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    values = {"gpu_memory": GIB, "max_input_len": 20, "max_new_tokens": 5}
    with pytest.raises(ValueError, match=message):
        PlanRequest(**{**values, **settings})


def test_folder_without_a_bundle(tmp_path):
    with pytest.raises(BundleError, match="expected a bundle"):
        plan(tmp_path)
