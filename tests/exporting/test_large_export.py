"""Models of 7B and 13B shapes, their weights holes in files: memory, disk, and what is said."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import pytest

pytestmark = pytest.mark.slow

CODE = """
import json, sys
from dllava_export.cli import main
from dllava_export.reporting.resources import measure_resources
with measure_resources() as meter:
    main(sys.argv[1:], standalone_mode=False)
    print("\\n" + json.dumps(meter.usage().to_json()))
"""
GB, MB, GIB = 1e9, 1e6, 2**30
SHAPES = {"7B": (factory.SPARSE_7B, 3), "13B": (factory.SPARSE_13B, 6)}  # and shards
PLAN = ["--gpu-memory", "80GiB", "--max-input-len", "640", "--max-new-tokens", "1024"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A command that ran in a process of its own: its output, and what it took, in bytes."""

    stdout: str
    peak_rss: int
    written: int


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Run:
    stdout, _ = process.communicate()
    assert process.returncode == 0
    *lines, usage = stdout.rstrip().split("\n")
    took = json.loads(usage)
    if took["bytes_written"] is None:
        pytest.skip("this system does not say how much a process wrote")
    return Run("\n".join(lines), took["peak_rss_bytes"], took["bytes_written"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()  # a backup of the folder would fill the holes


@pytest.fixture(scope="module")
def exports(folder) -> dict[str, Run]:
    """Both exports, side by side: tracing takes one core."""
    running = {}
    for size, (shapes, num_shards) in SHAPES.items():
        factory.make_sparse(folder / f"{size}_in", shapes, num_shards=num_shards)
        options = ["--image-keep-rate", "0.2", "--precision", "fp16", "--link"]
        running[size] = start("export", folder / f"{size}_in", folder / size, *options)
    for process in running.values():
        process.wait()  # all of them, also where the first one failed
    return {size: finish(process) for size, process in running.items()}


@pytest.fixture(params=SHAPES)
def size(request) -> str:
    return request.param


@pytest.fixture
def bundle(folder, exports, size) -> Path:
    return folder / size


def stats(folder: Path) -> list[os.stat_result]:
    return [path.stat() for path in folder.rglob("*") if path.is_file()]


def report(*arguments: object) -> tuple[dict[str, Any], Run]:
    run = finish(start(*arguments, "--json"))
    return json.loads(run.stdout), run


def test_export_needs_little_memory(exports, size):
    assert exports[size].peak_rss < 3 * GB


def test_export_writes_little(exports, bundle, size):
    found = stats(bundle)
    assert sum(stat.st_size for stat in found if stat.st_nlink == 1) < 100 * MB
    # Linked into llm/ and visual/ under their own size: the shards are all there.
    assert sum(stat.st_size for stat in found) > {"7B": 13, "13B": 26}[size] * GB
    assert exports[size].written < 100 * MB


def test_sparsify_needs_little(bundle, folder, size):
    out = folder / f"{size}_uniform"
    run = finish(start("sparsify", bundle, out, "--policy", "uniform", "--link"))
    assert run.peak_rss < 1 * GB
    assert run.written < 100 * MB
    assert "uniform, from layer 2 on: 288 of 576 image tokens" in run.stdout


def test_inspect_gives_the_numbers_of_the_paper(bundle, size):
    found, run = report("inspect", bundle)
    assert run.peak_rss < 0.5 * GB
    assert run.written < 1 * MB
    assert found["geometry"]["num_image_tokens"] == 576
    assert found["num_kept_image_tokens"] == 115
    dense, sparse = {"7B": (10.07e12, 2.488e12), "13B": (19.60e12, 4.656e12)}[size]
    assert found["dense"]["paper_prefill_flops"] == pytest.approx(dense, rel=1e-3)
    assert found["sparse"]["paper_prefill_flops"] == pytest.approx(sparse, rel=1e-3)


def test_plan_counts_weights_and_caches(bundle, size):
    found, run = report("plan", bundle, *PLAN)
    assert run.peak_rss < 0.5 * GB
    assert run.written < 1 * MB
    sparse = found["sparse"]
    shapes, _ = SHAPES[size]
    hidden, layers = shapes["hidden_size"], shapes["num_hidden_layers"]
    products = 4 * hidden**2 + 3 * hidden * shapes["intermediate_size"]
    weights = layers * (products + 2 * hidden) + hidden + 32000 * hidden
    # Beside the weights only the constants of the graph, some numbers each.
    assert sparse["bytes"]["decoder_weights"] == pytest.approx(2 * weights, abs=10_000)
    rows = (640 + 1024 + 1, 64 + 115 + 512 + 64 + 1)
    full, pruned = sparse["cache_groups"]
    assert (full["capacity"], pruned["capacity"]) == rows
    assert pruned["bytes"] == (layers - 2) * rows[1] * 2 * hidden * 2
    assert sparse["bytes"]["kv_cache"] == full["bytes"] + pruned["bytes"]
    assert found["dense"]["largest_batch"] < sparse["largest_batch"]
    assert sparse["bytes"]["decoder_activations"] < 0.1 * GIB


def test_plan_says_which_gpu_is_too_small(bundle, size):
    code = "from dllava_export.cli import main; main()"
    command = [sys.executable, "-c", code, "plan", bundle, *PLAN, "--gpu-memory", "12GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    taken = {"7B": "12.93 GiB", "13B": "24.58 GiB"}[size]
    assert f"take {taken}" in done.stderr
