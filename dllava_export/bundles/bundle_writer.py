"""Put files into a new bundle: written, cloned, copied or linked, and digested on the way.

    whole file ─┬─ link asked for, same file system ─► hard link
                ├─ the file system shares blocks ────► clone: takes no space, is a file of its own
                └─ otherwise ────────────────────────► copy, in pieces

onnx, and what reads models through it, refuses external data with several hard links. So a
link is made only where the user asked for one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from dllava_export.bundles.digests import BlockDigest, DigestingFile
from dllava_export.errors import BundleError
from dllava_export.reporting.output_files import replaced_when_complete

__all__ = ["BundleWriter", "progress_bar"]

logger = logging.getLogger(__name__)

_FICLONE = 0x40049409  # linux/fs.h: share all blocks of a file with another one
_PIECE_BYTES = 8 << 20

Sharing = Literal["linked", "cloned"]


class BundleWriter:
    """What has been put into a new bundle so far, and how.

    Attributes:
        progress: Show written bytes of large files on stderr.
        seconds: Time that writing files has taken.
    """

    def __init__(self, *, link: bool = False, progress: bool = False) -> None:
        """Start with nothing.

        Args:
            link: Hard-link whole files that `share` is asked for, where possible.
            progress: Show written bytes of large files on stderr.
        """
        self._link = link
        self.progress = progress
        self.seconds = 0.0
        self._shared: dict[tuple[int, int], tuple[Sharing, int]] = {}  # device, inode
        self._targets: dict[Path, Path] = {}  # file in the bundle → what it shares
        self._digests: dict[Path, tuple[int, int, str]] = {}

    @property
    def bytes_linked(self) -> int:
        """Bytes of files that are hard links; a file linked twice counts once."""
        return self._bytes("linked")

    @property
    def bytes_cloned(self) -> int:
        """Bytes of files that share their blocks with others; one cloned twice counts once."""
        return self._bytes("cloned")

    def _bytes(self, how: Sharing) -> int:
        return sum(size for found, size in self._shared.values() if found == how)

    def bytes_written(self, folder: Path) -> int:
        """Return the bytes of files in `folder` that are neither links nor clones."""
        paths = (path for path in folder.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in paths if path not in self._targets)

    def digest_of(self, path: Path) -> str | None:
        """Return the whole-file digest made while writing; None where there is none."""
        if path not in self._digests:
            return None
        *written, digest = self._digests[path]
        stat = path.stat()
        return digest if written == [stat.st_size, stat.st_mtime_ns] else None

    def share(self, source: Path, target: Path, *, may_link: bool = True) -> bool:
        """Let a new file share the bytes of `source`; return False where that is impossible.

        Args:
            source: A file, or a symbolic link to one.
            target: The new file.
            may_link: A hard link will do, if links were asked for.

        Raises:
            FileExistsError: If `target` is there.
        """
        real = source.resolve()  # a hub cache holds symbolic links
        if self._link and may_link and _link(real, target):
            self._remember(real, target, "linked")
            return True
        if _clone(real, target):
            self._remember(real, target, "cloned")
            return True
        return False

    def is_shared(self, source: Path, target: Path) -> bool:
        """Return whether `target` is a link to or a clone of `source` already."""
        return self._targets.get(target) == source.resolve() or (
            target.exists() and target.samefile(source)
        )

    def bring(self, source: Path, target: Path, *, may_link: bool = True) -> None:
        """Share the bytes of `source` where possible, else copy them.

        Args:
            source: A file, or a symbolic link to one.
            target: The new file.
            may_link: A hard link will do, if links were asked for.

        Raises:
            BundleError: If it cannot be copied.
        """
        if self.share(source, target, may_link=may_link):
            return
        total = source.stat().st_size
        with (
            source.open("rb") as data,
            self.new_file(target) as file,
            progress_bar(target, total, self.progress) as bar,
        ):
            while piece := data.read(_PIECE_BYTES):
                file.write(piece)
                bar.update(len(piece))

    @contextlib.contextmanager
    def new_file(self, path: Path) -> Iterator[DigestingFile]:
        """Open a new file that takes the place of `path` once the block is through.

        Raises:
            BundleError: If it cannot be written.
        """

        def failure(error: OSError) -> BundleError:
            return BundleError(
                f"{path} could not be written: {error}. Expected a writable folder with enough "
                "free space. Free some, or choose another output folder."
            )

        start = time.perf_counter()
        with BlockDigest() as digest:
            with replaced_when_complete(path, failure) as partial, partial.open("wb") as file:
                yield DigestingFile(file, digest)
            stat = path.stat()
            self._digests[path] = (stat.st_size, stat.st_mtime_ns, digest.hexdigest())
        self.seconds += time.perf_counter() - start

    def _remember(self, source: Path, target: Path, how: Sharing) -> None:
        stat = source.stat()
        self._shared[stat.st_dev, stat.st_ino] = how, stat.st_size
        self._targets[target] = source


def progress_bar(path: Path, total: int, enabled: bool) -> tqdm:
    """Return a bar over `total` bytes that are written to `path`; hidden where not `enabled`."""
    return tqdm(
        total=total,
        desc=path.name,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not enabled,
    )


def _link(source: Path, target: Path) -> bool:
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError as error:
        logger.info("%s cannot be hard-linked (%s): it is copied", source, error)
        return False
    return True


def _clone(source: Path, target: Path) -> bool:
    """Make `target` a file of its own that shares all blocks of `source`, where Linux can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    with source.open("rb") as data, target.open("xb") as file:
        try:
            fcntl.ioctl(file.fileno(), _FICLONE, data.fileno())
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
        else:
            return True
    target.unlink()
    logger.info("%s cannot share its blocks here: it is copied", source)
    return False
