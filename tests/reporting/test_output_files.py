from __future__ import annotations

import errno
import os

import pytest
from matplotlib.figure import Figure

from dllava_export.errors import InvalidInputError
from dllava_export.reporting.output_files import (
    check_plot_format,
    replaced_when_complete,
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


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "Choose a file you may write")],
)
def test_says_what_to_do_about_the_disk(tmp_path, number, remedy):
    with (
        pytest.raises(InvalidInputError, match=rf"cannot be written \(.*\)\. {remedy}\."),
        replaced_when_complete(tmp_path / "file"),
    ):
        raise OSError(number, os.strerror(number))
