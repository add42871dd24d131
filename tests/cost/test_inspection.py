from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from dllava_export.backends.cache_groups import CacheGroup
from dllava_export.cost.formulas import (
    KVGroup,
    exact_flops,
    kv_bytes,
    paper_flops,
    rows_per_layer,
)
from dllava_export.cost.inspection import inspect_geometry
from dllava_export.cost.inspection_plot import plot_report
from dllava_export.errors import InvalidInputError
from dllava_export.geometry import Geometry, PredictorGeometry
from dllava_export.precision import Precision
from dllava_export.sparsity import DENSE, Sparsity

FP32, FP16 = Precision.of("fp32"), Precision.of("fp16")
LLAVA_7B = Geometry(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    num_image_tokens=576,
    predictor=PredictorGeometry(),
)
TINY = Geometry(
    num_layers=3,
    hidden_size=10,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=50,
    num_image_tokens=9,
    predictor=PredictorGeometry(d_model=16, nhead=2, dim_feedforward=20, num_layers=2),
)


@pytest.mark.parametrize(
    ("hidden_size", "rows", "teraflops"),
    [
        pytest.param(4096, [576] * 32, 10.07, id="7B prefill"),
        pytest.param(4096, [576] * 2 + [115] * 30, 2.488, id="7B prefill, sparse"),
        pytest.param(4096, [576] * 3 + [144] * 29, 3.196, id="7B prefill, FastV"),
        pytest.param(5120, [576] * 40, 19.60, id="13B prefill"),
        pytest.param(5120, [576] * 2 + [115] * 38, 4.656, id="13B prefill, sparse"),
        pytest.param(4096, [159] * 32, 2.745, id="7B decoding"),
        pytest.param(4096, [159] * 2 + [84] * 30, 1.528, id="7B decoding, sparse"),
        pytest.param(5120, [159] * 40, 5.356, id="13B decoding"),
        pytest.param(5120, [159] * 2 + [84] * 38, 2.951, id="13B decoding, sparse"),
    ],
)
def test_gives_the_published_numbers(hidden_size, rows, teraflops):
    assert float(f"{paper_flops(hidden_size, rows) / 1e12:.4g}") == teraflops


def test_rows_fall_at_the_sparse_layer():
    assert rows_per_layer(LLAVA_7B, Sparsity(), 64) == [640] * 2 + [179] * 30
    assert rows_per_layer(LLAVA_7B, Sparsity(), 0) == [576] * 2 + [115] * 30
    assert rows_per_layer(LLAVA_7B, DENSE, 64) == [640] * 32


def test_number_of_kept_tokens_overrides_the_rate():
    sparsity = Sparsity(sparse_layer=1, image_keep_tokens=4)
    assert rows_per_layer(TINY, sparsity, 5) == [14, 9, 9]


def matmul(*shape):
    """FLOPs of [a, b] times [b, c]."""
    a, b, c = shape
    return 2 * a * b * c


def decoder_row(visible):
    """FLOPs of one row of one TINY layer, written out."""
    projections = matmul(1, 10, 24) + 2 * matmul(1, 10, 12) + matmul(1, 24, 10)
    attention = 4 * (matmul(1, 6, visible) + matmul(1, visible, 6))
    return projections + attention + 3 * matmul(1, 10, 24)


HEAD = matmul(1, 10, 50)
OUTPUT_MLP = matmul(1, 16, 8) + matmul(1, 8, 4) + matmul(1, 4, 2)
BLOCK = (
    matmul(9, 16, 48)
    + 2 * (matmul(9, 8, 9) + matmul(9, 9, 8))  # two heads of 8
    + matmul(9, 16, 16)
    + matmul(9, 16, 20)
    + matmul(9, 20, 16)
)
IMAGE_PREDICTOR = matmul(9, 10, 16) + 2 * BLOCK + 9 * OUTPUT_MLP
TEXT_PREDICTOR = matmul(1, 10, 16) + OUTPUT_MLP


def test_counts_a_dense_generation():
    flops = exact_flops(TINY, DENSE, prompt_text_len=5, output_len=4)
    prefill = HEAD + 3 * sum(decoder_row(row + 1) for row in range(14))
    steps = [HEAD + 3 * decoder_row(14 + step) for step in (1, 2, 3)]
    assert flops.prefill == prefill
    assert flops.decode_step == steps[-1]
    assert flops.generation == prefill + sum(steps)


def test_counts_a_sparse_generation_with_predictors():
    sparsity = Sparsity(sparse_layer=1, image_keep_tokens=4, output_text_keep_rate=0.5)
    flops = exact_flops(TINY, sparsity, prompt_text_len=5, output_len=4)
    prefill = HEAD + IMAGE_PREDICTOR + sum(decoder_row(row + 1) for row in range(14))
    prefill += 2 * sum(decoder_row(row + 1) for row in range(9))
    steps = [
        HEAD + TEXT_PREDICTOR + decoder_row(14 + step) + 2 * decoder_row(9 + stored + 1)
        for step, stored in ((1, 0), (2, 0.5), (3, 1))
    ]
    assert flops.prefill == prefill
    assert flops.decode_step == steps[-1]
    assert flops.generation == prefill + sum(steps)


def test_counts_no_predictor_of_a_policy_without_one():
    geometry = dataclasses.replace(TINY, predictor=None)
    options = {"sparse_layer": 1, "output_text_keep_rate": 1.0}
    trained = exact_flops(TINY, Sparsity(**options), 5, 4)
    uniform = exact_flops(geometry, Sparsity(policy="uniform", **options), 5, 4)
    assert trained.prefill - uniform.prefill == IMAGE_PREDICTOR
    assert trained.decode_step == uniform.decode_step


def test_one_token_needs_no_decode_step():
    flops = exact_flops(TINY, DENSE, prompt_text_len=5, output_len=1)
    assert flops.decode_step == 0
    assert flops.generation == flops.prefill


def test_kv_cache_of_both_groups():
    full, sparse = kv_bytes(LLAVA_7B, Sparsity(), FP16, prompt_text_len=64, output_len=255)
    row = 2 * 32 * 128 * 2
    assert full == KVGroup(CacheGroup("full", 0, 2), 895, 2 * 895 * row)
    assert sparse == KVGroup(CacheGroup("sparse", 2, 30), 179 + 128, 30 * 307 * row)


def test_kv_cache_stores_all_generated_tokens_without_a_keep_bit():
    sparsity = Sparsity(output_text_keep_rate=1.0)
    full, sparse = kv_bytes(LLAVA_7B, sparsity, FP16, prompt_text_len=64, output_len=255)
    assert (full.rows, sparse.rows) == (895, 179 + 255)


def test_kv_cache_counts_kv_heads_only():
    (full,) = kv_bytes(TINY, DENSE, FP32, prompt_text_len=5, output_len=6)
    assert full == KVGroup(CacheGroup("full", 0, 3), 20, 3 * 20 * 2 * 2 * 6 * 4)


PASSES = [
    {"name": "insert_predictor", "parameters": {"sparse_layer": 2}, "num_nodes": 7},
    {"name": "gather_kept"},
]


def test_report_as_text():
    text = inspect_geometry(LLAVA_7B, Sparsity(), FP16, passes=PASSES).to_text()
    lines = text.splitlines()
    assert lines[1].startswith("Sparsity  policy predictor; from layer 2 on 115 of 576 image")
    words = [" ".join(line.split()) for line in lines]
    assert "prefill rows, layers 2 to 31 640 179 28.0%" in words
    assert "prefill FLOPs, paper's formula (image rows) 10.07 T 2.488 T 24.7%" in words
    assert "KV cache, total 448.0 MiB 171.9 MiB 38.4%" in words
    assert lines[-2:] == ["   1  insert_predictor  sparse_layer=2", "   2  gather_kept"]
    table = lines[4 : lines.index("Passes") - 1]
    assert len({len(line) for line in table}) == 1


def test_report_of_a_dense_decoder_as_text():
    text = inspect_geometry(TINY, DENSE, FP32, output_len=1).to_text()
    assert "Sparsity  none: a dense decoder" in text
    assert "layers 0 to 2" in text
    assert "Passes" not in text
    assert text.splitlines()[7].split()[-3:] == ["0", "0", "-"]


def test_report_as_json():
    report = inspect_geometry(LLAVA_7B, Sparsity(), FP16, passes=PASSES)
    content = json.loads(json.dumps(report.to_json()))
    assert content["num_kept_image_tokens"] == 115
    assert content["sparse"]["rows_per_layer"] == report.rows[1]
    assert content["dense"]["flops"]["prefill"] == report.flops[0].prefill
    assert content["sparse"]["kv_cache"]["bytes"] == sum(g.bytes for g in report.kv[1])
    assert content["geometry"]["predictor"]["d_model"] == 512
    assert content["precision"] == dict.fromkeys(("weights", "activations", "cache"), "fp16")
    assert content["sparse"]["kv_cache"]["groups"][1]["num_layers"] == 30
    assert content["passes"] == PASSES


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_plot(tmp_path, name, magic):
    plot_report(inspect_geometry(TINY, Sparsity(), FP32), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_plot_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(_figure, path, **_options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(InvalidInputError, match=r"a\.png cannot be written \(disk full\)"):
        plot_report(inspect_geometry(TINY, Sparsity(), FP32), tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_plot_needs_no_pyplot(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_report(inspect_geometry(TINY, DENSE, FP32), tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_plot_of_another_format(tmp_path):
    message = r"a\.txt has suffix '\.txt', expected one of \.png, \.svg, \.pdf\. Change"
    with pytest.raises(ValueError, match=message):
        plot_report(inspect_geometry(TINY, DENSE, FP32), tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("geometry", "sparsity", "output_len", "message"),
    [
        pytest.param(TINY, Sparsity(sparse_layer=3), 4,
                     r"sparse_layer must be below the 3 layers of the model, got 3\.",
                     id="sparse layer"),
        pytest.param(TINY, DENSE, 0, r"output_len must be at least 1, got 0\.",
                     id="no output"),
        pytest.param(dataclasses.replace(TINY, predictor=None), Sparsity(), 4,
                     "the geometry has no predictor; expected its sizes", id="no predictor"),
        pytest.param(TINY, Sparsity(image_keep_rate=0.1), 4,
                     "0 of 9 image tokens would be kept", id="nothing kept"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(geometry, sparsity, output_len, message):
    with pytest.raises(ValueError, match=message):
        inspect_geometry(geometry, sparsity, FP32, output_len=output_len)
