"""What a plain installation can do: everything but export, train and validate."""

from __future__ import annotations

import configparser
import subprocess
import sys

import pytest
from places import DATA, ROOT

from dllava_export.extras import EXTRAS

# As if the packages of the extra were not there.
_WITHOUT = """
import importlib.metadata, sys
sys.modules.update(dict.fromkeys({modules!r}))
version = importlib.metadata.version
def hidden(name):
    if name in {modules!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    blocked = _WITHOUT.format(modules=sorted(EXTRAS["export"]))
    return subprocess.run(
        [sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=ROOT
    )


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(f"from dllava_export.cli import main; main({[str(a) for a in arguments]!r})")


def test_every_extra_is_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    for extra, modules in EXTRAS.items():
        for module in modules:
            assert module in extras[extra]
            assert module not in setup["options"]["install_requires"]


def test_a_bundle_runs_without_pytorch(bundles):
    path = bundles.path("mha")
    done = cli("run", path, "--image", "none", "--prompt", "w5", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "PyTorch" not in done.stderr


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (("export", DATA / "mha", "{out}"), "torch", "export"),
        (("validate", "{bundle}"), "polygraphy", "export"),
        (("train-predictors", DATA / "mha", ROOT / "setup.cfg", "{out}"), "torch", "train"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_that_lacks_a_package_says_so(bundles, tmp_path, command, module, extra):
    places = {"out": tmp_path / "out", "bundle": bundles.path("mha")}
    done = cli(*(str(part).format(**places) for part in command))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"needs {module}, which is not installed. Install it: pip install" in line
    assert f'dllava-export[{extra}]"' in line
    assert not (tmp_path / "out").exists()


def test_a_bundle_is_sparsified_inspected_and_evaluated_without_pytorch(bundles, tmp_path):
    out = tmp_path / "out"
    done = cli("sparsify", bundles.path("mha"), out, "--policy", "uniform")
    assert done.returncode == 0, done.stderr
    assert cli("inspect", out).returncode == 0
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "text": "w5", "answer": "w6"}\n')
    done = cli("evaluate", out, questions, "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
