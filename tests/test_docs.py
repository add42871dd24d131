"""The pages say what is true: links lead somewhere, commands exist, examples run."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from command_reference import PROGRAM, command_context
from places import CAT, ROOT

from dllava_export.cli import main
from dllava_export.exporting import tracing
from dllava_export.exporting.tracing import trace

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "passes" / "README.md",
    *DOCS,
    ROOT / "docs" / "benchmarks" / "README.md",
    *sorted(ROOT.glob("examples/**/README.md")),
]
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(
    re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", EXTENDING, re.MULTILINE | re.DOTALL)
)
TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Links.


def anchors(page: Path) -> set[str]:
    """Return what links into a page may end with, as GitHub makes it from headings."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {slug.replace(" ", "-") for slug in plain} | {*re.findall(r'<a id="(.+?)">', text)}


def broken_links(page: Path) -> list[str]:
    """Return relative links of a page that lead nowhere."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`(?!\])", "", text)  # code that only looks like a link
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_there = target.exists() and (not anchor or anchor in anchors(target))
        broken += [] if is_there else [link]
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#b) [c](page.md#a-title) [d](gone.md)\n")
    assert broken_links(page) == ["#b", "gone.md"]


# README.


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 220


def test_readme_lists_every_command_in_its_order():
    text = README.read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(.+?)`\]\(docs/commands\.md#", text, re.MULTILINE) == [
        *main.commands
    ]


def test_code_map_names_every_package():
    code_map = README.read_text(encoding="utf-8").partition("## Code map")[2]
    named = set(re.findall(r"`([\w/]+/)`", code_map))
    package = ROOT / "dllava_export"
    expected = {
        f"{found.parent.relative_to(package)}/" for found in package.glob("*/**/__init__.py")
    }
    expected |= {"passes/", "passes/policies/", "plugins/"}
    assert named == expected


# Commands.


def shown_commands(page: Path) -> list[list[str]]:
    """Return the calls of the program in a page's code blocks, in words."""
    blocks = (block for _, block in _FENCED.findall(page.read_text(encoding="utf-8")))
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.removeprefix("$ "), comments=True)
        for line in lines
        if re.match(rf"(\$ )?{PROGRAM} [a-z-]", line) and "[OPTIONS]" not in line
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_shown_exist(page):
    for _, *words in shown_commands(page):
        name = next(word for word in words if not word.startswith("-"))
        assert name in main.commands, words
        known = {
            flag
            for context in map(command_context, (PROGRAM, name))
            for param in context.command.get_params(context)
            for flag in param.opts
        }
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known, words


# Troubleshooting.


def code_messages() -> set[str]:
    """Return every text of the code, `…` in place of what is filled in."""
    found = set()
    for folder in ("dllava_export", "passes", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(part, "value", "") for part in node.values]
                    text = "".join(part if isinstance(part, str) else "…" for part in parts)
                    found.add(re.sub("…+", "…", text))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_messages_are_those_of_the_code():
    messages = re.findall(r"^> (`+) ?(.+?) ?\1$", TROUBLES, re.MULTILINE)
    assert len(messages) > 30
    known = code_messages()
    assert [text for _, text in messages if text not in known] == []


# Extending.


def test_every_kind_of_extension_has_an_example():
    assert list(SECTIONS) == ["A policy", "A family", "A pass", "A backend"]


@pytest.mark.parametrize("section", SECTIONS)
def test_examples_of_extending_run(section, bundles, tmp_path, monkeypatch):
    shutil.copytree(bundles.path("mha"), tmp_path / "out")
    (tmp_path / "cat.png").symlink_to(CAT)
    site = tmp_path / "site"
    info = site / "extension-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extension\nVersion: 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(site)
    # Traces that tests share are told apart by what a LLaVA is: another family traces anew.
    monkeypatch.setattr(tracing, "trace_decoder", lambda c, t: trace(c.spec.decoder(), t))
    monkeypatch.setattr(tracing, "trace_visual", lambda c, t: trace(c.spec.visual(), t))
    scripts = []
    for language, block in _FENCED.findall(SECTIONS[section]):
        is_module = re.match(r"# (\w+)\.py\n", block)
        if language == "toml":
            groups = tomllib.loads(block)["project"]["entry-points"]
            ((group, entries),) = groups.items()
            lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
            (info / "entry_points.txt").write_text("\n".join(lines))
        elif is_module:
            (site / f"{is_module[1]}.py").write_text(block)
            monkeypatch.delitem(sys.modules, is_module[1], raising=False)
        elif language == "python":
            scripts.append(block)
    assert scripts
    for script in scripts:
        exec(compile(script, f"docs/extending.md: {section}", "exec"), {})
