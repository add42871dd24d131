"""What every command shares: errors in one message, an example, what it took at the end."""

from __future__ import annotations

import traceback
from typing import Any

import click

from dllava_export.boundary import expected_errors_only
from dllava_export.errors import DllavaExportError, UnexpectedError
from dllava_export.extras import missing_packages_explained
from dllava_export.reporting.interrupts import terminate_as_exit
from dllava_export.reporting.resources import ResourceUsage, measure_resources

__all__ = ["Command"]

_PROFILE = "dllava_export.profile"


class Command(click.Command):
    """A command that reports expected errors as one message, and what it took.

    The message holds the error, and the pass that raised it. An error that nobody thought of
    shows its traceback before it. The epilog is one example, kept as it is written. Time,
    memory and bytes written are a line on stderr, after the result; every command has
    `--profile`, which adds the stages. SIGTERM ends it as Ctrl-C does: nothing half written
    stays.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(
            click.Option(
                ["--profile"],
                is_flag=True,
                expose_value=False,
                callback=_remember_profile,
                help="Say at the end what each stage took: time, memory, bytes written.",
            )
        )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"Example:\n\n  {self.epilog}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, then say what it took.

        Raises:
            click.ClickException: In place of an error of this package.
        """
        with terminate_as_exit(), measure_resources() as meter:
            try:
                result = self._invoke_with_messages(ctx)
            except click.exceptions.Exit:  # a result too: of a check that failed
                _show_usage(ctx, meter.usage())
                raise
            _show_usage(ctx, meter.usage())
        return result

    def _invoke_with_messages(self, ctx: click.Context) -> Any:
        others = (click.ClickException, click.exceptions.Exit, click.Abort)
        try:
            with (
                expected_errors_only(ctx.command_path, others=others),
                missing_packages_explained(ctx.command_path),
            ):
                return super().invoke(ctx)
        except DllavaExportError as error:
            if isinstance(error, UnexpectedError):
                click.echo("".join(traceback.format_exception(error.__cause__)), err=True)
            message = " ".join([str(error), *(f"({note})" for note in _notes(error))])
            raise click.ClickException(message) from error


def _remember_profile(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_PROFILE] = value


def _show_usage(ctx: click.Context, usage: ResourceUsage) -> None:
    """Write to stderr: stdout is for results."""
    if ctx.meta[_PROFILE]:
        click.echo(usage.stages_text(), err=True)
    if not ctx.find_root().params.get("quiet"):
        click.echo(f"{ctx.info_name} {usage.to_text()}", err=True)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
