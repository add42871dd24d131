"""The layers of `pyproject.toml` hold: no import upwards, no circle."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installed_layout import lay_out
from places import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as an installation has it, passes and plugins inside."""
    return lay_out(tmp_path_factory.mktemp("installed"))


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_the_import_contracts_hold(installed):
    done = lint(installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_an_import_upwards_is_found(installed, tmp_path):
    shutil.copytree(installed, tmp_path / "copy")
    names = tmp_path / "copy" / "dllava_export" / "names.py"
    names.write_text(names.read_text() + "\nfrom dllava_export.runtime import session\n")
    done = lint(tmp_path / "copy")
    assert done.returncode == 1
    assert "dllava_export.names -> dllava_export.runtime.session" in done.stdout


def test_setup_cfg_lists_every_package(installed):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    found = {
        ".".join(path.parent.relative_to(installed).parts)
        for path in installed.rglob("__init__.py")
    }
    assert sorted(listed) == sorted(found)
