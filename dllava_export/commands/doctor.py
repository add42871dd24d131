"""`dllava-export doctor`: versions, backends, what is missing."""

from __future__ import annotations

import json

import click

from dllava_export.commands.command import Command

__all__ = ["doctor"]


@click.command(cls=Command, epilog="dllava-export doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Report versions, backends found, what is missing and how to get it."""
    from dllava_export.backends.doctor import collect

    report = collect()
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.to_text())
