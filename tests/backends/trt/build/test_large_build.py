"""Four layers of 7B shapes, their weights holes in a file, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import checkpoint_factory as factory
import pytest
from click.testing import CliRunner

from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.cli import main
from dllava_export.exporting.exporter import export_checkpoint

pytestmark = pytest.mark.slow

CODE = "import sys; from dllava_export.cli import main; main(sys.argv[1:])"
SIZES = ["--max-input-len", "640", "--max-kv-cache-capacity", "1025"]
MIB = 2**20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    factory.make_sparse_7b(folder / "in", num_layers=4)
    export_checkpoint(read_checkpoint(folder / "in"), folder / "out", link=True)
    yield folder / "out"
    for path in folder.rglob("*.safetensors"):
        path.unlink()  # a backup of the folder would fill the holes


def test_builds(bundle):
    pytest.importorskip("tensorrt_rtx")
    command = ["build", str(bundle), "--backend", "tensorrt-rtx", *SIZES]
    # A process of its own: what a build takes is not left to the other tests.
    done = subprocess.run(
        [sys.executable, "-c", CODE, *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((bundle / "engines" / "tensorrt-rtx" / "config.json").read_text())
    assert set(config["engines"]) == {"decoder", "visual", "recompute"}
    decoder = config["engines"]["decoder"]
    assert decoder["num_bytes"] > 100 * MIB
    assert decoder["profiles"]["prefill"]["past_key_values.3.key"]["max"][1] == 32


def test_dry_run_tells_memory(bundle):
    command = [
        "build",
        str(bundle),
        "--backend",
        "tensorrt-rtx",
        *SIZES,
        "--dry-run",
        "--json",
    ]
    plan = json.loads(CliRunner().invoke(main, command).stdout)
    decoder = plan["engines"][0]
    assert decoder["weight_bytes"] == pytest.approx(1815 * MIB, rel=0.02)
    assert plan["memory_bytes"] == int(1.7 * decoder["weight_bytes"]) + 768 * MIB
    assert plan["kv"]["capacities"]["full"] == 1025
