"""What a backend is: its name, how to open and build a bundle, its options, what it can do."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dllava_export.backends.gpus import Gpu
from dllava_export.errors import BackendError

if TYPE_CHECKING:
    from dllava_export.backends.backend import Backend
    from dllava_export.bundles.manifest import Manifest

__all__ = ["BackendFactory", "BackendOption", "BackendStatus", "NoOptions", "option"]


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine.

    Attributes:
        name: As in `--backend`.
        version: Of the installed package; None where there is none.
        can_run: Whether bundles run with it here.
        can_build: Whether it builds engines here; False for ONNX Runtime, which needs none.
        summary: What it can do here, in a sentence.
        install: The command that installs it.
        providers: ONNX Runtime execution providers that are built in; empty for the others.
    """

    name: str
    version: str | None
    can_run: bool
    summary: str
    install: str
    can_build: bool = False
    providers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class BackendOption:
    """How the command line offers an option of a backend.

    Attributes:
        name: Field of the backend's options.
        flag: `--provider`.
        help: One line, the default in brackets at its end.
        choices: Values it takes; empty for a whole number of at least 1.
    """

    name: str
    flag: str
    help: str
    choices: tuple[str, ...] = ()


def option(default: Any, flag: str, help: str, choices: Sequence[str] = ()) -> Any:
    """Return a field of a backend's options that the command line offers too.

    Args:
        default: Its value where nothing is said.
        flag: See `BackendOption`.
        help: See `BackendOption`.
        choices: See `BackendOption`.
    """
    return dataclasses.field(
        default=default, metadata={"flag": flag, "help": help, "choices": tuple(choices)}
    )


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Options of a backend that has none."""


class BackendFactory(abc.ABC):
    """Opens bundles in one runtime, and builds for it what it needs.

    Attributes:
        name: As `load` and `--backend` take it.
        summary: What it is, in one line of help.
        options: A frozen dataclass of the options that are its own; `option` makes fields that
            the command line offers.
        can_build: True where `build` makes engines for it, which it needs to run.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[type] = NoOptions
    can_build: ClassVar[bool] = False

    @abc.abstractmethod
    def open(
        self, folder: Path, manifest: Manifest, options: Any, *, verify: bool = True
    ) -> Backend:
        """Open a bundle.

        Args:
            folder: The bundle.
            manifest: Its manifest.
            options: An instance of `options`.
            verify: Compare files of the backend's own with their digests.

        Raises:
            BackendError: If the backend cannot run it.
        """

    @abc.abstractmethod
    def status(self, gpus: tuple[Gpu, ...]) -> BackendStatus:
        """Say what the backend can do on this machine; raises nothing."""

    def build(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        dry_run: bool = False,
        progress: bool = False,
    ) -> Any:
        """Build engines of a bundle, beside its graphs.

        Args:
            folder: The bundle.
            settings: Fields of the backend's build options.
            dry_run: Work out what would be built; the backend need not be installed.
            progress: Show a progress bar on stderr.

        Returns:
            A report with `to_text` and `to_json`.

        Raises:
            BackendError: If the backend builds nothing, or the build fails.
        """
        raise BackendError(
            f"Backend {self.name!r} runs bundles as they are; nothing is built."
        )

    def cli_options(self) -> list[BackendOption]:
        """Return the options that the command line offers."""
        return [
            BackendOption(field.name, **field.metadata)
            for field in dataclasses.fields(self.options)
            if field.metadata
        ]
