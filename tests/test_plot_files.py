from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from dllava_export.plot_files import check_plot_format, save_plot


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
            raise OSError("disk full")

    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        save_plot(Broken(), tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
