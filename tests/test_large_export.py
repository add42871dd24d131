"""A model of 7B shapes, its weights holes in a file: what an export takes, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint_factory as factory
import pytest
from click.testing import CliRunner

from dllava_export.cli import main

CODE = """
import resource, sys
from dllava_export.cli import main
main(sys.argv[1:], standalone_mode=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
GB = 1e9


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bundle, and the peak memory in bytes of the process that wrote it."""
    folder = tmp_path_factory.mktemp("large")
    factory.make_sparse_7b(folder / "in")
    command = ["export", folder / "in", folder / "out", "--image-keep-rate", "0.2"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *command], capture_output=True, text=True, check=True
    )
    peak = int(done.stdout.splitlines()[-1])
    yield folder / "out", peak if sys.platform == "darwin" else 1024 * peak
    for path in folder.rglob("*.safetensors"):
        path.unlink()  # a backup of the folder would fill the holes


def stats(folder: Path) -> list[os.stat_result]:
    return [path.stat() for path in folder.rglob("*") if path.is_file()]


def test_needs_little_memory(exported):
    assert exported[1] < 3 * GB


def test_writes_little(exported):
    found = stats(exported[0])
    assert sum(stat.st_size for stat in found if stat.st_nlink == 1) < 0.1 * GB
    assert max(stat.st_size for stat in found) > 13 * GB


def test_gives_the_numbers_of_the_paper(exported):
    done = CliRunner().invoke(main, ["inspect", str(exported[0]), "--json"])
    report = json.loads(done.stdout)
    assert report["geometry"]["num_image_tokens"] == 576
    assert report["num_kept_image_tokens"] == 115
    assert report["dense"]["paper_prefill_flops"] == pytest.approx(10.07e12, rel=1e-3)
    assert report["sparse"]["paper_prefill_flops"] == pytest.approx(2.488e12, rel=1e-3)
