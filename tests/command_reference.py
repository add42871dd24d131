"""Write the option lists of `docs/commands.md` from the command line itself.

`python tests/command_reference.py` replaces what stands between the markers; the rest of the
page is written by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from dllava_export.cli import main

TARGET = Path(__file__).parents[1] / "docs" / "commands.md"
PROGRAM = "dllava-export"

# In every command; the page says so once.
_SHARED = {"--help", "--profile"}
_BLOCK = re.compile(r"(<!-- options of (\S+) -->\n).*?(<!-- end of options -->\n)", re.DOTALL)


def command_reference(text: str) -> str:
    """Return the page with the option lists of today's commands.

    Raises:
        KeyError: If it has a list of a command that does not exist.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{options_of(found[2])}{found[3]}", text)


def listed_commands(text: str) -> list[str]:
    """Return the commands whose options the page lists, in its order."""
    return [found[2] for found in _BLOCK.finditer(text)]


def command_context(name: str) -> click.Context:
    """Return a context of a command, or of the program itself, as a call would make it."""
    root = click.Context(main, info_name=PROGRAM, **main.context_settings)
    if name == PROGRAM:
        return root
    command = main.commands[name]
    return click.Context(command, info_name=name, parent=root, **command.context_settings)


def options_of(name: str) -> str:
    """Return how a command is called, and its options as a list."""
    context = command_context(name)
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = []
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if isinstance(param, click.Argument) or record is None:
            continue  # arguments stand in the usage
        if name != PROGRAM and not _SHARED.isdisjoint(param.opts):
            continue
        names, text = (" ".join(part.split()) for part in record)
        lines.append(f"- `{names.replace(' RANGE', '')}`{f': {text}' if text else ''}\n")
    return f"```\n{usage}\n```\n\n{''.join(lines)}"


if __name__ == "__main__":
    page = TARGET.read_text(encoding="utf-8")
    TARGET.write_text(command_reference(page), encoding="utf-8")
    print(f"Wrote {TARGET}")
