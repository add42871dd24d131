"""Lay the package out as an installation does: `python tests/installed_layout.py FOLDER`.

`passes/` and `plugins/` stand at the top of the repository and are parts of the package. Tools
that read files instead of importing them (mypy, import-linter) see that only in this form.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lay_out(folder: Path) -> Path:
    """Copy the package to `folder/dllava_export`, which is replaced; return `folder`."""
    package = folder / "dllava_export"
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dllava_export", package, ignore=ignored)
    for part in ("passes", "plugins"):
        shutil.copytree(ROOT / part, package / part, ignore=ignored)
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, folder)
    return folder


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
