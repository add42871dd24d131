from __future__ import annotations

import errno
import fcntl
import os

import pytest

from dllava_export.bundles.bundle_writer import BundleWriter
from dllava_export.bundles.digests import whole_digest
from dllava_export.errors import BundleError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def clones(monkeypatch):
    """A file system that shares blocks."""

    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x40049409  # FICLONE
        os.write(target, os.pread(source, os.fstat(source).st_size, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


def test_copies_where_blocks_cannot_be_shared(source, tmp_path, no_clones):
    writer = BundleWriter()
    target = tmp_path / "target"
    assert not writer.share(source, target)
    assert not target.exists()
    writer.bring(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert not target.samefile(source)
    assert (writer.bytes_linked, writer.bytes_cloned) == (0, 0)
    assert writer.digest_of(target) == whole_digest(target)


def test_clones_where_blocks_can_be_shared(source, tmp_path, clones):
    writer = BundleWriter()
    for name in ("a", "b"):
        writer.bring(source, tmp_path / name)
        assert (tmp_path / name).read_bytes() == source.read_bytes()
        assert (tmp_path / name).stat().st_nlink == 1
        assert writer.is_shared(source, tmp_path / name)
    assert (writer.bytes_linked, writer.bytes_cloned) == (0, 7000)
    assert writer.bytes_written(tmp_path) == 7000  # `source` itself


def test_links_where_links_are_asked_for(source, tmp_path, clones):
    writer = BundleWriter(link=True)
    (tmp_path / "symbolic").symlink_to(source)
    writer.bring(tmp_path / "symbolic", tmp_path / "a")
    writer.bring(source, tmp_path / "b", may_link=False)
    assert (tmp_path / "a").samefile(source)
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "b").stat().st_nlink == 1
    assert writer.bytes_linked or writer.bytes_cloned


def test_copies_where_links_fail(source, tmp_path, no_clones, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    writer = BundleWriter(link=True)
    writer.bring(source, tmp_path / "target")
    assert writer.bytes_linked == 0
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("link", [False, True])
def test_never_replaces_a_file_by_a_shared_one(source, tmp_path, clones, link):
    (tmp_path / "target").write_text("mine")
    with pytest.raises(FileExistsError):
        BundleWriter(link=link).share(source, tmp_path / "target")
    assert (tmp_path / "target").read_text() == "mine"


def test_a_digest_counts_only_until_the_file_is_changed(tmp_path):
    writer, path = BundleWriter(), tmp_path / "file"
    with writer.new_file(path) as file:
        file.write(b"data")
    assert writer.digest_of(path) == whole_digest(path)
    path.write_bytes(b"other data")
    assert writer.digest_of(path) is None
    assert writer.digest_of(tmp_path / "another") is None


def test_reports_a_full_disk(tmp_path):
    message = r"file could not be written: .*No space left on device.* Free some"
    with (
        pytest.raises(BundleError, match=message),
        BundleWriter().new_file(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())
