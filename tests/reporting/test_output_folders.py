from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dllava_export.errors import BundleError
from dllava_export.reporting.output_folders import new_folder, replaced_folder


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
        pytest.raises(BundleError, match=r"out failed: another command has .* \(.*not empty"),
        new_folder(out) as folder,
    ):
        (folder / "ours").write_text("ours")
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert names_in(tmp_path) == ["out"]
    assert names_in(out) == ["theirs"]


def test_judges_a_symbolic_link_before_the_work(tmp_path):
    (tmp_path / "real").mkdir()
    for name, place in (("out", "real"), ("dangling", "nothing")):
        (tmp_path / name).symlink_to(tmp_path / place)
        message = rf"{name} is a symbolic link to .*{place}; expected a new or empty folder"
        with pytest.raises(BundleError, match=message), new_folder(tmp_path / name):
            pytest.fail("the work began")


def test_judges_a_mount_point_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    message = r"out is a mount point, .* Choose another name, .*out/bundle for example"
    with pytest.raises(BundleError, match=message), new_folder(tmp_path / "out"):
        pytest.fail("the work began")


@pytest.mark.parametrize("name", ["in", "in/out", "in/llm/out", "link/out"])
def test_judges_a_folder_inside_its_source_before_the_work(tmp_path, name):
    (tmp_path / "in" / "llm").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    sources = [tmp_path / "in"]
    message = r"lies in .*in, which it is made from; expected a folder elsewhere"
    with (
        pytest.raises(BundleError, match=message),
        new_folder(tmp_path / name, sources=sources),
    ):
        pytest.fail("the work began")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free some space"), (errno.EDQUOT, "Free some"), (errno.EIO, "Check the")],
)
def test_says_what_to_do_about_the_disk(tmp_path, number, remedy):
    with (
        pytest.raises(
            BundleError, match=rf"out failed: .*{remedy}.*; nothing was left behind"
        ),
        new_folder(tmp_path / "out"),
    ):
        raise OSError(number, os.strerror(number))


def test_names_the_file_that_could_not_be_read(tmp_path):
    with (
        pytest.raises(
            BundleError, match=r"failed: No such file .*absent\)\. Check the rights"
        ),
        new_folder(tmp_path / "out"),
    ):
        (tmp_path / "absent").read_bytes()


# Two commands, and commands that died.

WRITER = """
import sys, time
from pathlib import Path
from dllava_export.reporting.output_folders import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("theirs")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def another_command(tmp_path):
    """A process that is writing OUT."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_the_second_of_two_commands_says_so(tmp_path, another_command):
    message = rf"out is being written by another command \(process {another_command.pid}, in"
    with pytest.raises(BundleError, match=message), new_folder(tmp_path / "out"):
        pytest.fail("the work began")
    (left,) = names_in(tmp_path)
    assert left.startswith(".out.partial-")


def test_other_folders_may_be_written_meanwhile(tmp_path, another_command):
    with new_folder(tmp_path / "out2"):
        pass
    assert len(names_in(tmp_path)) == 2


def test_what_a_killed_command_left_is_removed_by_the_next(tmp_path, another_command):
    another_command.kill()
    another_command.wait()
    (left,) = names_in(tmp_path)
    assert left.startswith(".out.partial-")
    with new_folder(tmp_path / "out") as folder:
        assert names_in(tmp_path) == [folder.name]
    assert names_in(tmp_path) == ["out"]


def test_a_folder_that_never_got_its_lock_is_removed_later(tmp_path):
    for name, age in ((".out.new-1-a", 100), (".out.new-2-b", 0)):
        (tmp_path / name).mkdir()
        since = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (since, since))
    with new_folder(tmp_path / "out"):
        pass
    assert names_in(tmp_path) == [".out.new-2-b", "out"]


def test_works_where_there_are_no_locks(tmp_path, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.partial-1-x").mkdir()  # whose it is cannot be told
    with new_folder(tmp_path / "out"):
        pass
    assert names_in(tmp_path) == [".out.partial-1-x", "out"]


# A folder that takes another one's place.


@pytest.fixture
def engines(tmp_path):
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "decoder").write_text("good")
    return tmp_path / "engines"


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def can_exchange(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    return request.param


def test_a_new_folder_takes_the_place_of_the_old_one(engines, tmp_path, can_exchange):
    with replaced_folder(engines, "Advice.") as folder:
        (folder / "decoder").write_text("new")
        assert (engines / "decoder").read_text() == "good"
    assert (engines / "decoder").read_text() == "new"
    assert names_in(tmp_path) == ["engines"]


def test_the_old_folder_stays_when_something_fails(engines, tmp_path, can_exchange):
    message = r"engines failed: .* Free some .* what was there before is still there"
    with pytest.raises(BundleError, match=message), replaced_folder(engines, "Advice."):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (engines / "decoder").read_text() == "good"
    assert names_in(tmp_path) == ["engines"]


def test_says_what_to_do_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = r"file cannot be written \(.*\)\. Use a copy\."
    with (
        pytest.raises(BundleError, match=message),
        replaced_folder(tmp_path / "file" / "engines", "Use a copy."),
    ):
        pass


KILLED = """
import ctypes, os, signal, sys
from pathlib import Path
from dllava_export.reporting.output_folders import replaced_folder
target, kill_at, can_exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
if not can_exchange:
    ctypes.CDLL = lambda *_, **__: object()
count = 0
def hook(event, _):
    global count
    if event in ("os.rename", "shutil.rmtree", "ctypes.dlsym"):
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with replaced_folder(target, "Advice.") as folder:
    (folder / "decoder").write_text("new")
"""


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("kill_at", range(1, 6))
def test_a_kill_at_any_moment_loses_nothing(engines, tmp_path, kill_at, exchanges):
    command = [sys.executable, "-c", KILLED, str(engines), str(kill_at), str(exchanges)]
    code = subprocess.run(command).returncode
    assert code in (0, -signal.SIGKILL)
    there = [path.read_text() for path in tmp_path.glob("*/decoder")]
    hidden = [path.read_text() for path in tmp_path.glob(".*/decoder")]
    assert there or "good" in hidden
    if exchanges:
        assert (engines / "decoder").read_text() in ("good", "new")
    with pytest.raises(KeyboardInterrupt), replaced_folder(engines, "Advice."):
        assert (engines / "decoder").read_text() in ("good", "new")
        raise KeyboardInterrupt
    assert [name for name in names_in(tmp_path) if ".new-" not in name] == ["engines"]
