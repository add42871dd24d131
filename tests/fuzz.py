"""Feed mutated files to every reader and count what comes out; `tests/test_fuzz.py` runs a little.

    python tests/fuzz.py --minutes 10

Of each input nothing may come out but a result or an error of this package: no other exception,
no crash, no more than 10 s of processor time or 2 GB of memory, no file written elsewhere. Inputs
follow from seed, reader and number: `--reader NAME --only NUMBER` runs one again, with its
traceback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz_readers import READERS, Reader

from dllava_export.errors import DllavaExportError, UnexpectedError

OURS, ACCEPTED, RAW, HANG, OUTSIDE = (
    "our errors",
    "accepted",
    "raw exceptions",
    "hangs",
    "writes outside",
)
OUTCOMES = (OURS, ACCEPTED, RAW, HANG, OUTSIDE)
MAX_SECONDS, MAX_BYTES = 10, 2 << 30
_MAX_WALL_SECONDS = 6 * MAX_SECONDS
_VICTIM = b"nobody may write here"


class _Hang(BaseException):
    """Took too long."""


def _on_alarm(*_: object) -> None:
    raise _Hang


class _Watch:
    """Notes files that are written outside a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder.resolve())
        self._victim = folder / "outside" / "victim"
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        paths: tuple[Any, ...] = ()
        if event == "open" and isinstance(args[2], int):
            is_write = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            paths = args[:1] if is_write else ()
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"):
            paths = args[:1]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = args[1:2]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                self._check(os.fsdecode(path))

    def _check(self, path: str) -> None:
        whole = os.path.realpath(path)
        allowed = (self._folder + "/case", "/dev/null", "/proc/", "/dev/shm/")
        if not whole.startswith(allowed) and "__pycache__" not in whole:
            self.found.append(whole)

    def take(self) -> list[str]:
        """Return what was found since the last call."""
        if self._victim.read_bytes() != _VICTIM:
            self.found.append(str(self._victim))
        found, self.found = self.found, []
        return found


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _copy(folder: Path) -> tuple[Path, Path]:
    """Return the valid inputs, and a fresh copy of them."""
    templates, case = folder / "templates", folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(templates, case)
    return templates, case


def outcome_of(
    reader: Reader, folder: Path, files: list[Path], rng: random.Random
) -> tuple[str, str]:
    """Mutate one file of a copy and read it; return (outcome, what happened)."""
    templates, case = _copy(folder)
    file = case / rng.choice(files).relative_to(templates)
    reader.mutate(rng, file)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        reader.read(case, file)
    except UnexpectedError as error:
        return RAW, "".join(traceback.format_exception(error.__cause__))
    except DllavaExportError as error:
        return OURS, f"{type(error).__name__}: {error}"
    except _Hang:
        return HANG, "".join(traceback.format_exc())
    except Exception:
        return RAW, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return ACCEPTED, ""


def _work(
    reader: Reader,
    folder: Path,
    files: list[Path],
    seed: int,
    numbers: Iterator[int],
    results: multiprocessing.connection.Connection,
) -> None:
    for stream in (1, 2):  # native libraries complain of their inputs
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _on_alarm)
    _limit_memory()
    watch = _Watch(folder)
    os.chdir(folder / "case-parent")
    for file in set(files):  # as they are, they must be accepted
        _copy(folder)
        with contextlib.suppress(
            *((DllavaExportError,) if file.name in reader.refused else ())
        ):
            reader.read(
                folder / "case", folder / "case" / file.relative_to(folder / "templates")
            )
    watch.take()
    results.send((-1, ACCEPTED, ""))
    for number in numbers:
        rng = random.Random(f"{seed}/{reader.name}/{number}")
        results.send((number, None, ""))
        found = outcome_of(reader, folder, files, rng)
        outside = watch.take()
        results.send((number, *((OUTSIDE, str(outside)) if outside else found)))
    results.close()


def _is_ready(receive: multiprocessing.connection.Connection) -> bool:
    """Return whether the worker read the valid inputs."""
    try:
        return bool(receive.recv()[1] == ACCEPTED)
    except EOFError:
        return False


def fuzz_reader(
    reader: Reader, seed: int, *, num_inputs: int, seconds: float, first: int = 0
) -> Iterator[tuple[int, str, str]]:
    """Yield (number, outcome, what happened) of inputs until there are enough or time is up.

    Args:
        reader: The reader.
        seed: Of all inputs.
        num_inputs: At most so many.
        seconds: At most so long.
        first: Number of the first input.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name).resolve()
        for part in ("templates", "outside", "case-parent"):
            (folder / part).mkdir()
        (folder / "outside" / "victim").write_bytes(_VICTIM)
        files = reader.make(folder / "templates")
        end = time.monotonic() + seconds
        number, last = first, first + num_inputs
        while number < last and time.monotonic() < end:
            receive, send = context.Pipe(duplex=False)
            arguments = (reader, folder, files, seed, iter(range(number, last)), send)
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            send.close()
            started = False
            if not (receive.poll(_MAX_WALL_SECONDS) and _is_ready(receive)):
                raise RuntimeError(f"{reader.name} does not read its own valid inputs")
            with contextlib.suppress(EOFError):
                while number < last and time.monotonic() < end:
                    if not receive.poll(_MAX_WALL_SECONDS):
                        break
                    number, outcome, detail = receive.recv()
                    started = outcome is None
                    if not started:
                        yield number, outcome, detail
                        number += 1
            worker.join(1)  # a dead one takes a moment to be so
            is_alive = worker.is_alive()
            worker.kill()
            worker.join()
            if started and time.monotonic() < end:  # died, or does not come back
                what = f"exit code {worker.exitcode}"
                yield number, HANG if is_alive else RAW, f"input {number}: {what}"
                number += 1


def main() -> None:
    """Run the readers in turn and print counts as a table, and details of what may not be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for all readers together")
    parser.add_argument("--inputs", type=int, default=10**9, help="at most, of a fast reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", help="only this one; may be repeated")
    parser.add_argument("--only", type=int, help="only the input of this number")
    parser.add_argument("--json", action="store_true", help="print counts as JSON")
    options = parser.parse_args()
    readers = [r for r in READERS if not options.reader or r.name in options.reader]
    counts: dict[str, dict[str, int]] = {}
    for reader in readers:
        found: collections.Counter[str] = collections.Counter()
        num_inputs = max(1, round(options.inputs * reader.share))
        seen = set()
        for number, outcome, detail in fuzz_reader(
            reader,
            options.seed,
            num_inputs=1 if options.only is not None else num_inputs,
            seconds=60 * options.minutes / len(readers),
            first=options.only or 0,
        ):
            found[outcome] += 1
            last = detail.strip().splitlines()[-1:] or [""]
            is_new = (outcome, last[0][:60]) not in seen
            seen.add((outcome, last[0][:60]))
            if options.only is not None or (outcome not in (OURS, ACCEPTED) and is_new):
                print(f"--- {reader.name} {number}: {outcome}\n{detail}", file=sys.stderr)
        counts[reader.name] = {"inputs": found.total()} | {
            name: found[name] for name in OUTCOMES
        }
        if not options.json:
            _print_row(reader.name, counts[reader.name], is_first=reader is readers[0])
    if options.json:
        print(json.dumps(counts))


def _print_row(name: str, counts: dict[str, int], *, is_first: bool) -> None:
    if is_first:
        print("| reader |", " | ".join(counts), "|\n|", " | ".join(["---"] * 7), "|")
    print(
        f"| {name} |", " | ".join(f"{count:,}" for count in counts.values()), "|", flush=True
    )


if __name__ == "__main__":
    main()
