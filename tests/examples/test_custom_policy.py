"""The example with a policy of its own: installed, and used as its README says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import CAT, ROOT
from policy_graphs import image_rows, image_scores, reference_scores

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples" / "02_custom_policy"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1).splitlines()
CLI = [sys.executable, "-c", "from dllava_export.cli import main; main()"]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


def run(command: list[str], **settings: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example is installed into, from a copy: pip builds in the source."""
    folder = tmp_path_factory.mktemp("custom_policy")
    shutil.copytree(FOLDER, folder / "source", ignore=shutil.ignore_patterns("out"))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--target", folder / "site"]
    run([*PIP, "install", *map(str, options), str(folder / "source")])
    return folder / "site"


@pytest.fixture(scope="module")
def cli(site: Path):
    """Run the command line where the example is installed; return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def cli(*arguments: object, cwd: Path = ROOT) -> str:
        return run([*CLI, *map(str, arguments)], env=environment, cwd=cwd)

    return cli


@pytest.fixture(scope="module")
def policy():
    spec = importlib.util.spec_from_file_location("centre_policy", FOLDER / "centre_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CentrePolicy()


# The policy.


def test_is_one_short_file() -> None:
    assert len((FOLDER / "centre_policy.py").read_text().splitlines()) <= 60
    assert not list(FOLDER.glob("*_*.py"))[1:]


def test_keeps_the_middle(policy) -> None:
    (scores,) = reference_scores(policy, [[1, *[2] * 16, 1]])
    best = np.argsort(-scores, kind="stable")[:4]
    assert sorted(best.tolist()) == [5, 6, 9, 10]


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([[1, *[2] * 36, 1]], id="prefill"),
        pytest.param([[1, *[2] * 25, 1], [1, 1, 1, *[2] * 25], [1, 1]], id="batch"),
        pytest.param([[1, *[2] * 16, 1, 3, 3, 3], [*[2] * 16, 3]], id="recompute"),
        pytest.param([[2]], id="one patch"),
        pytest.param([[*[2] * 576]], id="24 x 24"),
    ],
)
def test_scores_equal_the_reference(policy, kinds: list[list[int]]) -> None:
    scores, expected = image_scores(policy, kinds), reference_scores(policy, kinds)
    for sample, rows in enumerate(image_rows(kinds)):
        assert scores[sample, rows].tolist() == expected[sample].tolist()


def test_decode_has_no_image(policy) -> None:
    assert np.isfinite(image_scores(policy, [[3], [3]])).all()


# The package.


def test_readme_has_an_introduction_and_says_how_to_run() -> None:
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert headings[:2] == ["Introduction", "Running The Example"]


def test_works_as_its_readme_says(cli, tmp_path: Path) -> None:
    """Run the README's commands in a copy of the folder, pip's aside; `site` has run that."""
    here = tmp_path / "examples" / FOLDER.name
    here.mkdir(parents=True)
    (here.parent / CAT.name).symlink_to(CAT)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (pip, *commands) = COMMANDS
    assert pip == "pip install ."
    printed = [cli(*shlex.split(command)[1:], cwd=here) for command in commands]
    assert len(printed) == 3
    assert (
        "centre (generated tokens: uniform), from layer 3 on: 18 of 64 image tok" in printed[0]
    )
    assert len(printed[1].split()) == 16
    assert printed[2].rstrip().splitlines()[-1].startswith("MATCH: ")
    assert [path.name for path in here.iterdir()] == ["out"]

    # No PYTHONPATH: a bundle runs without the package, and inspecting it says what is missing.
    run_again = [*CLI, *shlex.split(commands[1])[1:]]
    assert run(run_again, cwd=here) == printed[1]
    done = subprocess.run([*CLI, "inspect", "out"], capture_output=True, text=True, cwd=here)
    assert done.returncode == 1
    assert "got 'centre'. Is the package that provides it installed?" in done.stderr


def test_sparsifies_and_evaluates(cli, bundles, tmp_path: Path) -> None:
    out, questions = tmp_path / "out", tmp_path / "questions.json"
    cli("sparsify", bundles.path("mha"), out, "--policy", "centre", "--image-keep-tokens", 4)
    turns = [{"from": "human", "value": "<image>\nw5"}, {"from": "gpt", "value": "w6"}]
    record = {"id": "a", "image": CAT.name, "conversations": turns}
    questions.write_text(json.dumps([record, {**record, "id": "b"}]))
    options = ["--image-folder", CAT.parent, "--batch-size", 2, "--max-new-tokens", 2]
    text = cli("evaluate", out, questions, *options)
    assert re.search(r"^out +centre +4\.0 +100\.0 %", text, re.MULTILINE)


def test_help_lists_it(cli) -> None:
    text = " ".join(cli("sparsify", "--help").split())
    assert "centre: patches nearest the middle of the picture; none" in text
    assert "--output-text-policy [predictor|random|uniform|none]" in text
