"""What the GPU script found: one list of rows, written as JSON and as Markdown tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

__all__ = ["Report", "Row"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        part: Table that it belongs to.
        subject: What was run.
        passed: False for a mismatch, None where nothing was compared.
        figures: Column → value.
    """

    part: str
    subject: str
    passed: bool | None
    figures: dict[str, Any]


@dataclasses.dataclass
class Report:
    """Everything of one run.

    Attributes:
        environment: Versions and devices.
        rows: Results, in the order in which they came.
        left_out: What was not run, and why.
    """

    environment: dict[str, str]
    rows: list[Row] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_mismatches(self) -> int:
        """Rows that compared something and found it different."""
        return sum(row.passed is False for row in self.rows)

    def leave_out(self, reason: str) -> None:
        """Note what was not run, and why, once."""
        if reason not in self.left_out:
            self.left_out.append(reason)

    def write(self, folder: Path) -> None:
        """Write `check.json` and `check.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("check.json", json.dumps(dataclasses.asdict(self), indent=2) + "\n"),
            ("check.md", self.to_markdown()),
        ):
            partial = folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)

    def to_markdown(self) -> str:
        """Return a table per part, and what was left out."""
        lines = ["# GPU check", "", "| what | found |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in self.environment.items()]
        for part in dict.fromkeys(row.part for row in self.rows):
            lines += ["", f"## {part}", "", *_table([r for r in self.rows if r.part == part])]
        lines += ["", "## Left out", ""]
        lines += [f"- {reason}" for reason in self.left_out] or ["- nothing"]
        return "\n".join(lines) + "\n"

    def to_text(self) -> str:
        """Return the short form: one line per result, then what was left out."""
        marks = {True: "ok", False: "MISMATCH", None: "-"}
        width = max((len(row.subject) for row in self.rows), default=0)
        lines = [
            f"{marks[row.passed]:<8}  {row.part}: {row.subject:<{width}}  "
            + ", ".join(f"{name} {_cell(value)}" for name, value in row.figures.items())
            for row in self.rows
        ]
        lines += [f"left out  {reason}" for reason in self.left_out]
        lines.append(f"{len(self.rows)} results, {self.num_mismatches} mismatches")
        return "\n".join(lines)


def _table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row.figures))
    marks = {True: "yes", False: "**no**", None: ""}
    lines = [f"| subject | {' | '.join(columns)} | equal |"]
    lines.append("| --- |" + " --- |" * (len(columns) + 1))
    for row in rows:
        cells = [_cell(row.figures.get(name, "")) for name in columns]
        lines.append(f"| {row.subject} | {' | '.join(cells)} | {marks[row.passed]} |")
    return lines


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
