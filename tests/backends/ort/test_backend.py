from __future__ import annotations

import collections
import dataclasses
import sys

import numpy as np
import onnx
import pytest
import tolerances

from dllava_export import names
from dllava_export.backends.backend import StepInputs
from dllava_export.backends.cache_groups import CacheGroup
from dllava_export.backends.doctor import collect
from dllava_export.backends.kv_plan import KVPlan
from dllava_export.backends.ort.backend import OrtBackend, lowered_model, open_session
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import BackendError
from dllava_export.runtime.loading import load

PLAN = KVPlan(
    batch=2,
    groups=(CacheGroup("full", 0, 2), CacheGroup("sparse", 2, 2)),
    capacities={"full": 20, "sparse": 12},
    bytes_per_row=512,
)


@pytest.fixture(scope="module")
def opened(bundles):
    folder = bundles.path("mha")
    return folder, read_manifest(folder, verify=False)


@pytest.fixture
def backend(opened):
    return OrtBackend(*opened, num_threads=1)


def prompt_step(batch=2, rows=5):
    """Text rows of random embeddings on top of empty caches."""
    lengths = np.full(batch, rows)
    embeds = np.random.default_rng(0).normal(size=(batch, rows, 64)).astype(np.float32)
    zeros = np.zeros(batch, np.int64)
    return StepInputs(
        inputs_embeds=embeds,
        position_ids=np.tile(np.arange(rows), (batch, 1)),
        token_kind=np.full((batch, rows), names.PROMPT_TEXT),
        num_kept=lengths[:1],
        kept_lengths=lengths,
        num_image_rows=np.zeros(1, np.int64),
        write_indices={"full": zeros, "sparse": zeros},
    )


def test_caches_are_allocated_by_group(backend):
    backend.allocate(PLAN)
    shapes = [backend.cache(layer)[0].shape for layer in range(4)]
    assert shapes == [(2, 4, 20, 16)] * 2 + [(2, 4, 12, 16)] * 2


def test_prompts_report_their_rows(backend):
    backend.allocate(PLAN)
    outputs = backend.run(prompt_step())
    next_indices = {n: index.tolist() for n, index in outputs.next_write_indices.items()}
    assert next_indices == {"full": [5, 5], "sparse": [5, 5]}
    assert outputs.kept_indices.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert outputs.keep.tolist() == [True, True]
    assert outputs.logits.shape == (2, 131)


def test_growing_keeps_both_groups_rows(backend):
    backend.allocate(PLAN)
    backend.run(prompt_step())
    before = [part.copy() for layer in range(4) for part in backend.cache(layer)]
    backend.grow(PLAN.with_rows("sparse", 18))
    after = [part for layer in range(4) for part in backend.cache(layer)]
    assert after[-1].shape[2] == 19
    assert backend.plan.capacities == {"full": 20, "sparse": 19}
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(new[:, :, : old.shape[2]], old)
        assert (new[:, :, old.shape[2] :] == 0).all()


def test_a_sample_is_run_on_its_own_slice_of_the_caches(backend):
    backend.allocate(PLAN)
    backend.run(prompt_step(batch=1), sample=1)
    keys, _ = backend.cache(0)
    assert (keys[0] == 0).all()
    assert (keys[1, :, :5] != 0).all()


def test_recompute_equals_a_prompt_run(backend):
    backend.allocate(PLAN)
    step = prompt_step()
    recomputed = backend.recompute(step)
    assert recomputed.num_rows.tolist() == [5, 5]
    np.testing.assert_allclose(
        recomputed.logits, backend.run(step).logits, atol=tolerances.SAME_MODEL
    )


def test_a_portable_decoder_may_be_given(opened, backend):
    model = onnx.load(opened[0] / "llm" / layout.DECODER, load_external_data=False)
    given = OrtBackend(*opened, num_threads=1, decoder=model)
    results = []
    for subject in (backend, given):
        subject.allocate(PLAN)
        results.append(subject.run(prompt_step()).logits)
    assert np.array_equal(*results)


def test_lowering_leaves_weights_outside(opened):
    path = opened[0] / "llm" / layout.DECODER
    ops = {node.op_type for node in lowered_model(path).graph.node}
    assert "KVCacheAttention" not in ops
    assert "GroupQueryAttention" in ops
    assert lowered_model(path).ByteSize() < path.stat().st_size + 4096


def ops_for(folder, provider):
    model = lowered_model(folder / "llm" / layout.DECODER, provider=provider)
    return collections.Counter(node.op_type for node in model.graph.node)


def test_rotary_tables_are_computed_for_all_heads_at_once(bundles):
    folder = bundles.path("mha")
    portable = onnx.load(folder / "llm" / layout.DECODER, load_external_data=False)
    before = collections.Counter(node.op_type for node in portable.graph.node)
    after = ops_for(folder, "cpu")
    assert (after["Cos"], after["Sin"], after["Where"]) == (1, 1, before["Where"])
    assert after["Slice"] == before["Slice"] - 2


def test_cuda_takes_its_own_attention_in_half_precision_only(bundles):
    in_float32 = ops_for(bundles.path("mha"), "cuda")
    assert "KVCacheAttention" in in_float32
    assert "GroupQueryAttention" not in in_float32
    in_float16 = ops_for(bundles.path("mha", "fp16"), "cuda")
    assert "KVCacheAttention" not in in_float16
    assert "GroupQueryAttention" in in_float16


def test_only_cuda_takes_transposed_weights_in_half_precision(bundles):
    folder = bundles.path("mha", "fp16")
    on_gpu, on_cpu = (ops_for(folder, where)["FusedMatMul"] for where in ("cuda", "cpu"))
    # Seven in each layer and one for the logits; the float32 predictors have theirs anyway.
    assert on_gpu - on_cpu == 4 * 7 + 1


def test_never_computes_on_the_cpu_where_cuda_was_asked_for(opened):
    if collect().gpus:
        pytest.skip("there is an NVIDIA GPU")
    with pytest.raises(BackendError, match=r"without CUDA|fell back to the CPU"):
        OrtBackend(*opened, provider="cuda")


def test_a_failing_run_names_the_graph_and_shapes(backend):
    backend.allocate(PLAN)
    with pytest.raises(
        BackendError, match=r"failed in the decoder graph: .* inputs_embeds 3x5x64, "
    ):
        backend.run(prompt_step(batch=3))
    assert backend.run(prompt_step()).keep.tolist() == [True, True]


def test_logits_are_float32_in_every_precision(bundles):
    session = bundles.session("mha", "fp16")
    assert session.prefill([[5, 6]]).logits.dtype == np.float32
    assert session.decode([7]).logits.dtype == np.float32
    assert session.recompute([[5, 6]]).logits.dtype == np.float32


def test_refuses_bf16(bundles):
    with pytest.raises(BackendError, match=r"is in bf16, .* Export with --precision fp16 or"):
        load(bundles.path("mha", "bf16"))


def test_refuses_heads_the_attention_kernel_does_not_take(opened):
    folder, manifest = opened
    geometry = dataclasses.replace(manifest.geometry, head_dim=12)
    with pytest.raises(BackendError, match=r"has heads of 12, .* takes multiples of 8"):
        OrtBackend(folder, dataclasses.replace(manifest, geometry=geometry))


def test_says_so_where_onnx_runtime_is_missing(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot be imported .* pip install"):
        OrtBackend(*opened)


@pytest.mark.parametrize(
    "contents", [pytest.param(b"", id="empty"), pytest.param(b"no model", id="no model")]
)
def test_says_which_model_is_refused(tmp_path, contents):
    path = tmp_path / "model.onnx"
    path.write_bytes(contents)
    with pytest.raises(BackendError, match=r"ONNX Runtime refuses the model in .*model\.onnx"):
        open_session(path)


def test_says_where_weights_of_a_refused_model_were_looked_for(opened, tmp_path):
    model = lowered_model(opened[0] / "llm" / layout.DECODER)
    with pytest.raises(BackendError, match=f"refuses the model in {tmp_path}"):
        open_session(model, folder=tmp_path)
