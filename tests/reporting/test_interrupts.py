from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from dllava_export.reporting.interrupts import interrupts_as_themselves, terminate_as_exit


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A shell that runs the tests in the background lets them ignore SIGINT: they would wait."""
    signals = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in signals.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wraps_everything(number: int) -> None:
    """Do as a library that makes an error of its own of each one it meets."""
    try:
        os.kill(os.getpid(), number)
        signal.pause()
    except BaseException as error:
        raise RuntimeError("conversion failed") from error


def swallows_everything(number: int) -> None:
    with contextlib.suppress(RuntimeError):
        wraps_everything(number)


@pytest.mark.parametrize("library", [wraps_everything, swallows_everything])
def test_an_interrupt_comes_out_as_itself(library):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_as_themselves():
        library(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == handler


def test_so_does_termination():
    with (
        pytest.raises(SystemExit) as caught,
        terminate_as_exit(),
        interrupts_as_themselves(),
    ):
        wraps_everything(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_errors_without_an_interrupt_stay_what_they_are():
    with pytest.raises(RuntimeError, match="really"), interrupts_as_themselves():
        raise RuntimeError("really")


def test_a_handler_of_somebody_else_stays():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminate_as_exit():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_have_no_handlers():
    results = []

    def work() -> None:
        with terminate_as_exit(), interrupts_as_themselves():
            results.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [signal.SIG_DFL]


COMMAND = """
import sys, time
from pathlib import Path
import click
from dllava_export.cli import main
from dllava_export.commands.command import Command
from dllava_export.reporting.output_folders import new_folder

@main.command(cls=Command)
@click.argument("out", type=click.Path(path_type=Path))
def slow(out):
    with new_folder(out):
        print("writing", flush=True)
        time.sleep(60)

main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_command_that_is_ended_cleans_up(tmp_path, number, code):
    command = [sys.executable, "-c", COMMAND, "slow", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert not list(tmp_path.iterdir())
