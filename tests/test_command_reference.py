from __future__ import annotations

from command_reference import PROGRAM, TARGET, command_reference, listed_commands, options_of

from dllava_export.cli import main


def test_option_lists_are_what_the_commands_say():
    text = TARGET.read_text(encoding="utf-8")
    message = "Run `python tests/command_reference.py` and commit docs/commands.md."
    assert text == command_reference(text), message


def test_every_command_has_a_section_and_its_options():
    text = TARGET.read_text(encoding="utf-8")
    assert listed_commands(text) == [PROGRAM, *main.commands]
    for name in main.commands:
        assert f"\n## {name}\n" in text


def test_a_new_option_would_be_listed():
    page = "before\n<!-- options of doctor -->\nold\n<!-- end of options -->\nafter\n"
    assert command_reference(page) == page.replace("old\n", options_of("doctor"))
    assert "- `--json`: Print JSON.\n" in options_of("doctor")
