"""Bundles of the golden checkpoints, exported once for all tests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import onnx
import pytest
import torch
from golden import DATA
from installed_packages import Packages
from policy_package import PolicyPackages
from word_tokenizer import save_tokenizer

from dllava_export.checkpoints.checkpoint import Checkpoint, read_checkpoint
from dllava_export.exporting import tracing
from dllava_export.exporting.exporter import export_checkpoint
from dllava_export.exporting.options import SparsityOptions
from dllava_export.exporting.sparsifier import sparsify_decoder
from dllava_export.runtime.loading import load
from dllava_export.runtime.session import Session


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-steps",
        type=int,
        default=6,
        help="Calls in each sequence of test_concurrent_sessions.py.  [default: 6]",
    )


class Bundles:
    """Bundles and sessions by what they are, each made when it is first asked for.

    `mha` has a tokenizer of words `w3` to `w130`, `gqa` has none. A precision needs an export of
    its own; other settings of sparsity come from the exported bundle by `sparsify`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[tuple, Path] = {}
        self._sessions: dict[tuple, Session] = {}

    def path(self, checkpoint: str, precision: str = "fp32", **sparsity: object) -> Path:
        """Return a bundle; tests must not change it."""
        key = (checkpoint, precision, *sorted(sparsity.items()))
        if key not in self._paths:
            base = self.path(checkpoint, precision) if sparsity else None
            out = self._folder / f"{checkpoint}_{len(self._paths)}"
            if base is not None:
                sparsify_decoder(base, out, SparsityOptions(**sparsity))
            else:
                export_checkpoint(
                    read_checkpoint(self._checkpoint(checkpoint)), out, precision=precision
                )
            self._paths[key] = out
        return self._paths[key]

    def session(self, checkpoint: str, precision: str = "fp32", **sparsity: object) -> Session:
        """Return a session that tests share: each starts it anew with a prefill."""
        key = (checkpoint, precision, *sorted(sparsity.items()))
        if key not in self._sessions:
            self._sessions[key] = self.fresh_session(checkpoint, precision, **sparsity)
        return self._sessions[key]

    def fresh_session(
        self,
        checkpoint: str,
        precision: str = "fp32",
        *,
        max_length: int | None = None,
        **sparsity: object,
    ) -> Session:
        """Return a session of the test's own."""
        path = self.path(checkpoint, precision, **sparsity)
        return load(path, max_length=max_length, num_threads=1, verify=False)

    def _checkpoint(self, name: str) -> Path:
        if name != "mha":
            return DATA / name
        path = self._folder / "mha_with_tokenizer"
        if not path.exists():
            shutil.copytree(DATA / name, path, copy_function=shutil.copyfile)
            save_tokenizer(path)
        return path


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles of the golden checkpoints."""
    return Bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trace models of one shape once in a run: a trace takes seconds and never looks at weights.

    Graphs are kept in files, so that several processes of one run (`-n 2`) share them.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "traced_graphs"
    folder.mkdir(exist_ok=True)

    def remember(trace: Callable[..., onnx.ModelProto]) -> Callable[..., onnx.ModelProto]:
        def remembered(checkpoint: Checkpoint, dtype: torch.dtype) -> onnx.ModelProto:
            settings = [
                value.to_dict() if hasattr(value, "to_dict") else value
                for value in vars(checkpoint.spec).values()
            ]
            key = f"{trace.__name__} {dtype} {type(checkpoint.spec)} {settings}"
            path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"
            with filelock.FileLock(f"{path}.lock"):
                if not path.exists():
                    path.write_bytes(trace(checkpoint, dtype).SerializeToString())
            return onnx.load(path, load_external_data=False)

        return remembered

    with pytest.MonkeyPatch.context() as patch:
        for name in ("trace_decoder", "trace_visual"):
            patch.setattr(tracing, name, remember(getattr(tracing, name)))
        yield


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    """Packages that add to a registry, there during one test."""
    folder = tmp_path / "packages"
    folder.mkdir()
    return Packages(folder, monkeypatch)


@pytest.fixture
def policy_packages(packages: Packages) -> PolicyPackages:
    """Packages with policies, there during one test."""
    return PolicyPackages(packages)


@pytest.fixture
def no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system on which files cannot share their blocks."""

    def ioctl(*_: int) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
