"""What every command shares: errors in one message, an example at the end of its help."""

from __future__ import annotations

from typing import Any

import click

from dllava_export.errors import DllavaExportError

__all__ = ["Command"]


class Command(click.Command):
    """A command that reports expected errors as one message.

    The message holds the error, and the pass that raised it. Unexpected errors keep their
    traceback. The epilog is one example, kept as it is written.
    """

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"Example:\n\n  {self.epilog}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            click.ClickException: In place of an error of this package.
        """
        try:
            return super().invoke(ctx)
        except (DllavaExportError, ValueError) as error:
            if isinstance(error, ValueError) and not _is_ours(error):
                raise
            message = " ".join([str(error), *(f"({note})" for note in _notes(error))])
            raise click.ClickException(message) from error


def _is_ours(error: ValueError) -> bool:
    """True for a setting that this package refused: the error was raised in its own code."""
    traceback = error.__traceback__
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.startswith("dllava_export")


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
