from __future__ import annotations

import re
import subprocess

import pytest
from places import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = sorted(path.parent for path in ROOT.glob("examples/*/run.sh"))
ARTIFACTS = {
    "01_export_and_run": {"out", "out.png"},
    "digit_mosaic": {"out", "out.png"},
    "polygraphy": {"out", "out_inputs", "out_decode.json"},
}
PRINTED = {
    "01_export_and_run": ["7 of 36 image tokens"],
    "digit_mosaic": ["115 of 576 image tokens", "truth", "[right]", "Drew out.png"],
    "polygraphy": ["Wrote inputs of every graph", "MATCH", "Pass Rate: 100.00%"],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_readme_has_an_introduction_and_says_how_to_run(example):
    headings = re.findall(r"^## (.+)$", (example / "README.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Introduction", "Running The Example"]
    assert "./run.sh" in (example / "README.md").read_text()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_runs_and_leaves_what_it_says(example):
    if not (ROOT / ".venv" / "ready").exists():
        pytest.skip("no .venv: the example would install one; ./tests/run.sh makes it")
    if example.name not in ARTIFACTS:
        pytest.skip(
            "needs 22 GiB of memory; test_large_export.py runs its steps but the build"
        )
    before = {path.name for path in example.iterdir()} - ARTIFACTS[example.name]
    done = subprocess.run(
        ["./run.sh"], cwd=example, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in example.iterdir()} == before | ARTIFACTS[example.name]
    for text in PRINTED[example.name]:
        assert text in done.stdout
