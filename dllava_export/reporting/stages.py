"""A progress bar over named stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from dllava_export.reporting import resources

__all__ = ["show_stages"]


_Stage = contextlib.AbstractContextManager[None]


@contextlib.contextmanager
def show_stages(enabled: bool, total: int) -> Iterator[Callable[[str], _Stage]]:
    """Show which of `total` stages work is in, on stderr; tracing cannot tell how far it is.

    What it yields takes the name of a stage, and gives the block that is the stage.
    """
    from tqdm import tqdm

    form = "{desc} {bar} {n}/{total} [{elapsed}]"
    with tqdm(total=total, disable=not enabled, bar_format=form) as bar:

        def stage(name: str) -> _Stage:
            bar.set_description(f"{name:28}")
            bar.update()
            return resources.stage(name)

        yield stage
