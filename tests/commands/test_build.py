from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from dllava_export.cli import main


@pytest.fixture
def no_tensorrt(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def build(bundles, no_tensorrt):
    folder = str(bundles.path("mha", "fp32"))
    return lambda *options: CliRunner().invoke(main, ["build", folder, *options])


def test_dry_run_needs_no_tensorrt(build):
    done = build(
        *("--backend", "tensorrt-rtx", "--dry-run", "--max-batch-size", "2"),
        *("--max-input-len", "120", "--max-kv-cache-capacity", "301"),
        *("--opt-shapes", "inputs_embeds:1x80x64"),
    )
    assert done.exit_code == 0
    assert "Engines for tensorrt-rtx, fp32, up to 2 samples of 120 rows" in done.stdout
    assert "[1x1x64]  [1x80x64]  [2x120x64]" in done.stdout
    assert "memory to build  about" in done.stdout


def test_dry_run_as_json(build):
    done = build("--backend", "tensorrt", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert [engine["name"] for engine in plan["engines"]] == ["decoder", "visual", "recompute"]
    assert plan["kv"]["capacities"]["full"] == 513
    assert plan["memory_bytes"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "tensorrt"], "tensorrt cannot be imported"),
        (
            ["--backend", "tensorrt-rtx", "--opt-shapes", "nope:1"],
            "There is no input 'nope' to give a shape",
        ),
        (
            ["--backend", "tensorrt-rtx", "--min-shapes", "position_ids:1x120", "--dry-run"],
            "rows has min 120, opt 100, max 274; expected min <= opt <= max",
        ),
        (
            ["--backend", "tensorrt-rtx", "--max-shapes", "position_ids=1x2"],
            "expected NAME:1x2x3",
        ),
        (
            ["--backend", "tensorrt-rtx", "--timing-cache-file", "t.cache"],
            "timing_cache_file is for tensorrt",
        ),
        (
            ["--backend", "tensorrt-rtx", "--max-kv-cache-capacity", "20"],
            "max_kv_cache_capacity is 20, expected at least 37",
        ),
    ],
)
def test_errors(build, options, message):
    done = build(*options)
    assert done.exit_code == 1
    assert message in done.stderr


def test_backend_must_be_named(build):
    done = build()
    assert done.exit_code == 2
    assert "--backend" in done.stderr
