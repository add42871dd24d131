"""Write what the suite found: JSON with every number, Markdown tables, plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dllava_export.benchmark.plot import plot_geometry
from dllava_export.benchmark.results import (
    CaseResult,
    GeometryResult,
    Spread,
    SubjectTimes,
    SuiteReport,
    ratio,
)
from dllava_export.benchmark.subject import DENSE, SPARSE
from dllava_export.reporting.byte_sizes import format_bytes
from dllava_export.reporting.output_files import write_text

__all__ = ["report_markdown", "report_summary", "write_report"]

_TITLES = {SPARSE: "dllava-export, sparse", DENSE: "dllava-export, dense"}


def write_report(report: SuiteReport, folder: Path) -> list[Path]:
    """Write `DATE_suite.json`, `.md` and a plot for each geometry.

    Args:
        report: What to write.
        folder: Where; created if need be.

    Returns:
        The files.

    Raises:
        InvalidInputError: If one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{report.date}_suite"
    numbers, text = folder / f"{stem}.json", folder / f"{stem}.md"
    plots = [folder / f"{stem}_{result.geometry.name}.png" for result in report.geometries]
    write_text(numbers, json.dumps(report.to_json(), indent=2) + "\n")
    write_text(text, report_markdown(report))
    for result, path in zip(report.geometries, plots, strict=True):
        plot_geometry(result, path)
    return [numbers, text, *plots]


def report_markdown(report: SuiteReport) -> str:
    """Return all tables as Markdown."""
    settings, machine = report.settings, report.machine
    parts = [
        f"# Benchmark suite, {report.date}",
        f"`dllava-export bench --suite`, {report.seconds / 60:.0f} minutes. "
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{format_bytes(machine['memory_bytes'])} RAM, {machine['system']}, Python "
        f"{machine['python']}. {settings.num_threads} threads for every subject.",
        f"Random weights, fp32. The prompt has {settings.num_image_tokens} image tokens and "
        f"{settings.num_text_tokens} text tokens; peers get as many token ids, and no vision "
        "tower is part of any time. From decoder layer "
        f"{settings.sparse_layer} on, sparse keeps {settings.image_keep_rate:.0%} of the image "
        f"and {settings.output_text_keep_rate:.0%} of the generated tokens.",
        "Every subject has a process of its own. They are measured in turns, round after round, "
        "every second time in reverse; "
        "a cell is the median of the rounds, with the least and the most in brackets. Ratios "
        "are taken within a round. `decode@n`: one token for each sample, with n generated "
        "tokens in the caches. These are filled, not generated: with random rows (this toolkit, "
        "transformers), or by feeding random tokens as prompt (onnxruntime-genai, llama.cpp). A "
        f"round's time is the median of {settings.decode_steps} steps.",
    ]
    for result in report.geometries:
        parts += _geometry_parts(result, report)
    return "\n\n".join(parts) + "\n"


def report_summary(report: SuiteReport) -> str:
    """Return medians as times over the sparse decoder's, a line for each subject and batch."""
    lines = ["times as long as sparse: prefill, then decode by generated tokens"]
    for result in report.geometries:
        for case in result.cases:
            lines.append(f"{result.geometry.name}, batch {case.batch_size}")
            own = case.times[SPARSE]
            for name, times in case.times.items():
                cells = [f"{ratio(times.prefill_ms, own.prefill_ms).median:.2f}"]
                cells += [
                    f"{length}: {ratio(values, own.decode_ms[length]).median:.2f}"
                    for length, values in times.decode_ms.items()
                ]
                lines.append(f"  {name:<27}  " + "  ".join(cells))
        lines += [f"  left out: {name}: {why}" for name, why in result.left_out.items()]
    return "\n".join(lines)


def _geometry_parts(result: GeometryResult, report: SuiteReport) -> list[str]:
    settings = report.settings
    name = f"{report.date}_suite_{result.geometry.name}.png"
    parts = [
        f"## {result.geometry.title}",
        f"{result.geometry.to_text()}.",
        f"![times and memory]({name})",
    ]
    for case, plan in zip(result.cases, result.geometry.cases, strict=True):
        title = f"### Batch {case.batch_size}"
        rounds = (
            f"Starts of all processes: {result.geometry.num_starts}. Rounds in each: "
            f"{plan.prefill_rounds} of prefill, {plan.decode_rounds} of decode. Times in ms."
        )
        parts += [title, rounds, _times_table(case)]
        for base in (SPARSE, DENSE):
            parts += [f"Times as long as `{_title(base)}`:", _ratio_table(case, base)]
    parts += [
        "### Memory of each process",
        "Resident memory, pages of mapped weight files included; conversions to a subject's own "
        "format ran in other processes.",
        _memory_table(result),
    ]
    sparse = result.sparse
    parts += [
        "### The sparse decoder",
        "\n".join(
            [
                f"- KV bytes from layer {settings.sparse_layer} on after "
                f"{settings.kv_length} tokens really generated (random ones, each through the "
                f"predictor): {format_bytes(sparse.kv_bytes)} of the dense "
                f"{format_bytes(sparse.dense_kv_bytes)}, "
                f"{sparse.kv_bytes / sparse.dense_kv_bytes:.1%}. The predictor, calibrated to "
                f"{settings.output_text_keep_rate:.0%} on these tokens, kept "
                f"{sparse.kept_share:.1%} of them.",
                "- Share of a decode step spent outside ONNX Runtime, batch 1: "
                f"{sparse.decode_overhead:.1%} sparse, {sparse.dense_decode_overhead:.1%} "
                "dense.",
                "- Share of the prefill that scoring and selecting tokens takes, batch 1, from "
                f"ONNX Runtime's profile: {sparse.predictor_share:.1%}.",
            ]
        ),
        "### How each one runs",
        _subjects_table(result),
    ]
    if result.left_out:
        lines = [f"- {name}: {reason}" for name, reason in result.left_out.items()]
        parts += ["### Left out", "\n".join(lines)]
    return parts


def _title(name: str) -> str:
    return _TITLES.get(name, name)


def _times_table(case: CaseResult) -> str:
    return _case_table(case, lambda values, _: _spread(Spread.of(values)))


def _ratio_table(case: CaseResult, base: str) -> str:
    own = case.times[base]

    def cell(values: list[float], column: int | None) -> str:
        against = own.prefill_ms if column is None else own.decode_ms[column]
        return _spread(ratio(values, against), 2)

    return _case_table(case, cell)


def _case_table(case: CaseResult, cell: Callable[[list[float], int | None], str]) -> str:
    """Return a row for each subject, a column for prefill and each length."""
    lengths = list(case.times[SPARSE].decode_ms)
    rows = [["", "prefill", *(f"decode@{length}" for length in lengths)]]
    for name, times in case.times.items():
        cells = [cell(times.decode_ms[length], length) for length in lengths]
        rows.append([_title(name), cell(times.prefill_ms, None), *cells])
    return _table(rows)


def _memory_table(result: GeometryResult) -> str:
    """Return resident memory when loaded, then the peak by the end of each stage."""
    header = ["peak RSS until", "loaded"]
    for case in result.cases:
        header += [f"prefill, batch {case.batch_size}", f"decode, batch {case.batch_size}"]
    rows = [header]
    for name, loaded in result.loaded.items():
        cells = [_size(loaded.peak_rss_bytes)]
        for case in result.cases:
            memory = case.times.get(name, SubjectTimes()).memory
            cells += [
                _size(memory[stage].peak_rss_bytes) if stage in memory else "-"
                for stage in ("prefill", "decode")
            ]
        rows.append([_title(name), *cells])
    return _table(rows)


def _subjects_table(result: GeometryResult) -> str:
    rows = [["", "version", "how", "largest logit difference"]]
    for name, facts in result.subjects.items():
        found = [
            case.times[name].logit_difference for case in result.cases if name in case.times
        ]
        largest = max((value for value in found if value is not None), default=None)
        cell = "-" if largest is None else f"{largest:.1e}"
        rows.append([_title(name), facts.version, facts.notes, cell])
    return (
        _table(rows)
        + "\n\nLogits after the prompt are compared with those of transformers and its dynamic "
        "cache: all dense subjects compute the same function of the same weights and ids."
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))


def _spread(spread: Spread, digits: int = 1) -> str:
    low, high = f"{spread.low:.{digits}f}", f"{spread.high:.{digits}f}"
    return f"{spread.median:.{digits}f} ({low} to {high})"


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else format_bytes(num_bytes)
