"""`dllava-export chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dllava_export.commands.options import (
    BackendCommand,
    backend_options,
    given_backend_options,
    prompt_options,
    sampling_options,
    single_image,
)

if TYPE_CHECKING:
    from dllava_export.runtime.chat import Chat

__all__ = ["chat"]

_HELP = """\
/image FILE   start anew, with a picture
/new          start anew, without one
/help         show this
/quit         end (so does Ctrl-D)"""


@click.command(cls=BackendCommand, epilog="dllava-export chat out --image cat.png")
@click.argument("bundle", type=click.Path(path_type=Path))
@single_image(help="A picture for the first question.")
@prompt_options
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens of one answer at most.",
)
@sampling_options
@backend_options
def chat(
    bundle: Path,
    image: str | None,
    system: str | None,
    raw_prompt: bool,
    allow_special: bool,
    backend: str,
    **settings: Any,
) -> None:
    """Talk with BUNDLE about a picture: questions from the terminal, or one on each line of stdin.

    Every question builds on what was said before, whose keys and values stay in the cache,
    pruned as they were. /help lists what can be typed besides questions.
    """
    from dllava_export.runtime.loading import load

    is_terminal = sys.stdin.isatty()
    with load(bundle, backend, **given_backend_options()) as session:
        if is_terminal:
            click.echo("Ask a question; /help lists commands.", err=True)

        def start_anew() -> Chat:
            return session.chat(
                system=system, raw_prompt=raw_prompt, allow_special=allow_special
            )

        talk, picture = start_anew(), image
        while (line := _read_line(is_terminal)) is not None:
            if line.startswith("/"):
                talk, picture, is_over = _obey(start_anew, talk, picture, line)
                if is_over:
                    return
            elif line:
                _answer(talk, line, picture, is_terminal, settings)
                picture = None


def _read_line(is_terminal: bool) -> str | None:
    """Return what was typed, or None at the end."""
    if is_terminal:
        click.echo("> ", nl=False)
    line = sys.stdin.readline()
    if not line:
        if is_terminal:
            click.echo()
        return None
    return line.strip()


def _obey(
    start_anew: Callable[[], Chat], talk: Chat, picture: str | None, line: str
) -> tuple[Chat, str | None, bool]:
    """Return the conversation to go on with, its picture, and whether that was all."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return talk, picture, True
    if command == "/new":
        return start_anew(), None, False
    if command == "/image" and rest.strip():
        return start_anew(), rest.strip(), False
    if command != "/help":
        click.echo(f"There is no command {line!r}.", err=True)
    click.echo(_HELP, err=True)
    return talk, picture, False


def _answer(
    talk: Chat, question: str, picture: str | None, is_terminal: bool, settings: dict[str, Any]
) -> None:
    from dllava_export.errors import InvalidInputError

    try:
        stream = talk.stream(question, picture, **settings)
        for piece in stream:
            click.echo(piece.text, nl=False)
    except InvalidInputError as error:
        if not is_terminal:
            raise
        click.echo(str(error), err=True)  # a mistyped file name need not end the conversation
        return
    click.echo()
