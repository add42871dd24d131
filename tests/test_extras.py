"""What a plain installation can do: everything but export, train and validate."""

from __future__ import annotations

import configparser
import subprocess
import sys

import pytest
from places import DATA, ROOT

from dllava_export.extras import EXTRAS

# As if the packages of the extra were not there.
_WITHOUT = "import sys; sys.modules.update(dict.fromkeys({modules!r})); "


def run(code: str) -> subprocess.CompletedProcess[str]:
    blocked = _WITHOUT.format(modules=sorted(EXTRAS))
    return subprocess.run(
        [sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=ROOT
    )


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(f"from dllava_export.cli import main; main({[str(a) for a in arguments]!r})")


def test_every_extra_is_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    for module, extra in EXTRAS.items():
        assert module in extras[extra]
        assert module not in setup["options"]["install_requires"]


def test_a_bundle_runs_without_pytorch(bundles):
    path = bundles.path("mha")
    done = cli("run", path, "--image", "none", "--prompt", "w5", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "PyTorch" not in done.stderr


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (("export", DATA / "mha", "{out}"), "torch"),
        (("validate", "{bundle}"), "polygraphy"),
        (("train-predictors", DATA / "mha", ROOT / "setup.cfg", "{out}"), "torch"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_that_lacks_a_package_says_so_in_one_line(
    bundles, tmp_path, command, module
):
    places = {"out": tmp_path / "out", "bundle": bundles.path("mha")}
    done = cli(*(str(part).format(**places) for part in command))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"needs {module}, which is not installed. Install it: pip install" in line
    assert 'dllava-export[export]"' in line
    assert not (tmp_path / "out").exists()
