from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from engine_folders import BACKEND, VERSION, make_config, write_bundle_with_engines

from dllava_export.backends.cache_groups import CacheGroup
from dllava_export.backends.kv_plan import KVPlan
from dllava_export.backends.trt.engine_config import (
    ProfileShapes,
    engine_folder,
    read_engine_config,
)
from dllava_export.backends.trt.engine_files import (
    check_device,
    check_plan,
    check_request,
    checked_config,
    engine_bytes,
    engine_entry,
)
from dllava_export.errors import BackendError, CapacityError

CONFIG = make_config()
FULL, SPARSE = CacheGroup("full", 0, 2), CacheGroup("sparse", 2, 2)
PLAN = KVPlan(
    batch=2, groups=(FULL, SPARSE), capacities={"full": 30, "sparse": 20}, bytes_per_row=512
)
RANGES = {
    "inputs_embeds": ProfileShapes((1, 1, 64), (1, 8, 64), (2, 16, 64)),
    "num_kept": ProfileShapes((1,), (8,), (16,), is_values=True),
    "odd": ProfileShapes((4,), (4,), (4,)),
}
SYMBOLS = {"inputs_embeds": ["batch", "rows", 64], "num_kept": [1], "odd": [4]}
REQUEST = {"inputs_embeds": (2, 16, 64), "num_kept": np.array([16]), "odd": (4,)}


@pytest.fixture
def folder(tmp_path):
    return write_bundle_with_engines(tmp_path / "bundle")


def test_reads_engines_that_fit(folder):
    config = checked_config(folder, BACKEND, VERSION)
    assert config == read_engine_config(folder, BACKEND)
    contents = engine_bytes(folder, config, "decoder", verify=True)
    assert contents.tobytes() == b"decoder engine"


def test_says_how_to_build_missing_engines(tmp_path):
    folder = write_bundle_with_engines(tmp_path / "bundle", engines={})
    (engine_folder(folder, BACKEND) / "config.json").unlink()
    with pytest.raises(BackendError, match=r"has no engines for .* build .* --backend"):
        checked_config(folder, BACKEND, VERSION)


def test_refuses_engines_of_another_version(folder):
    with pytest.raises(
        BackendError, match=r"built by tensorrt-rtx 1\.7\.1\.116; 1\.8\.0\.1 is"
    ):
        checked_config(folder, BACKEND, "1.8.0.1")


def test_refuses_engines_of_other_weights(folder):
    path = folder / "dllava_export.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["llm/model.onnx"]["sha256"] = "changed"
    path.write_text(json.dumps(manifest))
    with pytest.raises(BackendError, match="built from other graphs or weights"):
        checked_config(folder, BACKEND, VERSION)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        pytest.param(None, r"decoder\.engine is missing", id="missing"),
        pytest.param(b"decod", r"has 5 bytes, .* says 14", id="cut off"),
        pytest.param(b"decoder Engine", r"is damaged: its digest is", id="changed"),
    ],
)
def test_refuses_damaged_engine_files(folder, contents, message):
    path = engine_folder(folder, BACKEND) / "decoder.engine"
    path.unlink() if contents is None else path.write_bytes(contents)
    config = checked_config(folder, BACKEND, VERSION)
    with pytest.raises(BackendError, match=message):
        engine_bytes(folder, config, "decoder", verify=True)


def test_size_alone_is_checked_without_verify(folder):
    (engine_folder(folder, BACKEND) / "decoder.engine").write_bytes(b"decoder Engine")
    config = checked_config(folder, BACKEND, VERSION)
    contents = engine_bytes(folder, config, "decoder", verify=False)
    assert contents.tobytes() == b"decoder Engine"


def test_says_why_an_engine_was_not_built(folder):
    with pytest.raises(
        BackendError, match=r"no recompute engine .*: no kernel\. What needs it"
    ):
        engine_entry(make_config(not_built={"recompute": "no kernel."}), "recompute", folder)
    with pytest.raises(BackendError, match=r"no visual engine .*: it was left out"):
        engine_entry(CONFIG, "visual", folder)


def test_an_engine_for_this_gpu_is_taken():
    check_device(make_config(compute_capabilities=("8.6", "8.9")), "L4", "8.9")
    check_device(CONFIG, "L4", "8.9")  # built for whatever the backend targets


def test_refuses_another_gpu():
    config = make_config(compute_capabilities=("8.6", "8.9"))
    with pytest.raises(BackendError, match=r"8\.6, 8\.9; this GPU, H100, has 9\.0.* 9\.0\."):
        check_device(config, "H100", "9.0")


def test_the_plan_becomes_the_engines_capacities():
    assert check_plan(CONFIG, PLAN) == dataclasses.replace(
        PLAN, capacities={"full": 33, "sparse": 25}
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"batch": 3},
            BackendError,
            r"has 3 samples, .* take 2 .*--max-batch-size 3",
            id="batch",
        ),
        pytest.param(
            {"capacities": {"full": 34, "sparse": 20}},
            CapacityError,
            "full KV caches need 33 rows, .* 32",
            id="full",
        ),
        pytest.param(
            {"capacities": {"full": 30, "sparse": 26}},
            CapacityError,
            "sparse KV caches need 25 rows, the engine's have 24",
            id="sparse",
        ),
    ],
)
def test_refuses_plans_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        check_plan(CONFIG, dataclasses.replace(PLAN, **change))


def test_a_dense_decoder_has_no_sparse_caches_to_fit():
    plan = dataclasses.replace(
        PLAN, groups=(CacheGroup("full", 0, 4),), capacities={"full": 30}
    )
    assert check_plan(CONFIG, plan).capacities == {"full": 33}


def test_a_request_inside_the_profile_is_taken():
    check_request("decoder", "prefill", RANGES, REQUEST, SYMBOLS)
    smallest = {"inputs_embeds": (1, 1, 64), "num_kept": np.array([1]), "odd": (4,)}
    check_request("decoder", "prefill", RANGES, smallest, SYMBOLS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"inputs_embeds": (5, 16, 64)},
            r"'prefill' .*decoder.* 'inputs_embeds' with shape 1x1x64 to 2x16x64, the request has "
            r"5x16x64\. Build with --max-batch-size 5",
            id="batch",
        ),
        pytest.param(
            {"inputs_embeds": (2, 17, 64)},
            "has 2x17x64. Build with --max-input-len 17",
            id="rows",
        ),
        pytest.param(
            {"num_kept": np.array([17])},
            r"'num_kept' with values 1 to 16, the request has 17\. Build with a range for "
            "num_kept",
            id="value",
        ),
        pytest.param({"odd": (3,)}, "covers 'odd' with shape 4 to 4.* has 3", id="fixed"),
        pytest.param({"inputs_embeds": (2, 16)}, "has 2x16", id="rank"),
    ],
)
def test_names_what_a_profile_does_not_cover(change, message):
    with pytest.raises(BackendError, match=message):
        check_request("decoder", "prefill", RANGES, REQUEST | change, SYMBOLS)


def test_an_input_that_nothing_feeds_is_an_error():
    ranges = RANGES | {"strange": ProfileShapes((1,), (1,), (1,))}
    with pytest.raises(BackendError, match="has an input 'strange' that this version"):
        check_request("decoder", "prefill", ranges, REQUEST, SYMBOLS)
