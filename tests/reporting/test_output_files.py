from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dllava_export.errors import BundleError, InvalidInputError
from dllava_export.reporting.output_files import (
    check_plot_format,
    new_folder,
    save_plot,
    write_text,
)


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_suffix_gives_the_format(tmp_path, name, magic):
    save_plot(Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_refuses_another_format():
    with pytest.raises(ValueError, match=r"a\.txt has suffix '\.txt', expected one of \.png"):
        check_plot_format("a.txt")


def test_leaves_the_old_file_when_it_fails(tmp_path):
    class Broken(Figure):
        def savefig(self, path, **_):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(InvalidInputError, match=r"a\.png cannot be written \(No space left"):
        save_plot(Broken(), tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_write_text(tmp_path):
    write_text(tmp_path / "a.md", "ä")
    assert [p.name for p in tmp_path.iterdir()] == ["a.md"]
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "ä"


def test_write_text_where_it_cannot_be_written(tmp_path):
    with pytest.raises(InvalidInputError, match=r"no/a\.md cannot be written \(No such file"):
        write_text(tmp_path / "no" / "a.md", "a")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# A new folder.


def test_becomes_whole_at_the_end(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path
    assert names_in(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "text"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_fills_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
    assert names_in(tmp_path / "out") == ["file"]


def test_makes_the_folders_above(tmp_path):
    with new_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_vanishes_when_something_fails(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
        raise error
    assert names_in(tmp_path) == []


def test_reports_a_full_disk(tmp_path):
    message = r"out failed: No space left on device\. Free some space .* nothing was left"
    with pytest.raises(BundleError, match=message), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names_in(tmp_path) == []


def test_refuses_a_folder_with_files_in_it(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = r"is a folder with files in it; expected a new or empty folder\. Choose another"
    with pytest.raises(BundleError, match=message), new_folder(tmp_path):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    message = r"out is a file; expected a new"
    with pytest.raises(BundleError, match=message), new_folder(tmp_path / "out"):
        pass


def test_refuses_a_place_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = r"file cannot be written \(.*\)\. Choose a folder you may write\."
    with pytest.raises(BundleError, match=message), new_folder(tmp_path / "file" / "out"):
        pass


def test_refuses_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    message = r"cannot be written \(Permission denied\)\. Choose a folder you may write\."
    with pytest.raises(BundleError, match=message), new_folder(tmp_path / "out"):
        pass


def test_a_folder_that_was_filled_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(BundleError, match=r"out failed: .*not empty"),
        new_folder(out) as folder,
    ):
        (folder / "ours").write_text("ours")
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert names_in(tmp_path) == ["out"]
    assert names_in(out) == ["theirs"]
