from __future__ import annotations

import click
import pytest
from click.testing import CliRunner, Result

from dllava_export.commands.command import Command
from dllava_export.errors import BundleError
from dllava_export.reporting.resources import stage


@click.group()
@click.option("--quiet", is_flag=True)
def main(quiet: bool) -> None:
    """A group like that of the command line."""


@main.command(cls=Command)
@click.argument("end")
@click.pass_context
def work(ctx: click.Context, end: str) -> None:
    """Do it."""
    with stage("working"):
        click.echo("result")
    if end == "failed check":
        ctx.exit(1)
    if end == "error":
        raise BundleError("The bundle is damaged.")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(("end", "code"), [("well", 0), ("failed check", 1)])
def test_says_what_it_took_after_the_result(end, code):
    result = invoke("work", end)
    assert (result.exit_code, result.stdout) == (code, "result\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("work took 0.0 s; peak RSS ")


def test_an_error_has_the_last_word():
    result = invoke("work", "error")
    assert (result.exit_code, result.stderr) == (1, "Error: The bundle is damaged.\n")


def test_profile_shows_stages():
    *table, last = invoke("work", "well", "--profile").stderr.splitlines()
    assert [line.split()[0] for line in table] == ["stage", "working", "other", "in"]
    assert last.startswith("work took")


def test_quiet_leaves_only_what_was_asked_for():
    assert invoke("--quiet", "work", "well").stderr == ""
    assert invoke("--quiet", "work", "well", "--profile").stderr.startswith("stage")


def test_help_offers_the_profile():
    assert "--profile" in invoke("work", "--help").stdout
