"""`dllava-export bench`: time a bundle against its dense form, or run the benchmark suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dllava_export.backends.registry import DEFAULT_BACKEND
from dllava_export.commands.command import Command
from dllava_export.commands.options import backend_choice, check_folder

__all__ = ["bench"]

_SUITE_OPTIONS = ("suite", "out", "threads")
_SUITE_FOLDER = Path("docs/benchmarks")


@click.command(cls=Command, epilog="dllava-export bench out --decode-lengths 0,512,1024")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option(
    "--prompt-len",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Text tokens of the prompt, beside the image.",
)
@click.option(
    "--decode-lengths",
    default="0,256",
    show_default=True,
    help="Generated tokens in the cache when decode steps are timed.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Interleaved rounds; medians are reported.",
)
@backend_choice(
    default=DEFAULT_BACKEND,
    show_default=True,
    help="What runs the bundle; the TensorRT ones run engines of `dllava-export build`, which are "
    "timed alone.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Write all numbers to this file too.",
)
@click.option(
    "--suite",
    is_flag=True,
    help="Instead of a BUNDLE, measure models of random weights at two geometries, beside "
    "transformers, onnxruntime-genai and llama.cpp where they are installed. Takes about half "
    "an hour on two cores, 18 GiB of memory and 7 GiB of temporary files.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder for the suite's tables and plots.  [default: {_SUITE_FOLDER}]",
)
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    bundle: Path | None,
    decode_lengths: str,
    json_file: Path | None,
    suite: bool,
    out: Path | None,
    **values: Any,
) -> None:
    """Time BUNDLE against its dense form and transformers, in one run, as ratios.

    With --suite, measure this toolkit beside its peers instead.
    """
    from dllava_export import api
    from dllava_export.reporting.output_files import write_text

    progress = ctx.obj["progress"]
    if suite:
        _check_suite_options(ctx)
        _run_suite(values["threads"], out or _SUITE_FOLDER, progress=progress)
        return
    if bundle is None or out is not None:
        raise click.UsageError(
            "Give a BUNDLE to time, or --suite, which makes models of its own; --out belongs to "
            "--suite."
        )
    report = api.bench(
        bundle,
        progress=progress,
        prompt_text_len=values["prompt_len"],
        decode_lengths=_parse_lengths(decode_lengths),
        batch_size=values["batch_size"],
        num_threads=values["threads"],
        rounds=values["rounds"],
        backend=values["backend"],
    )
    click.echo(report.to_text())
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_json(), indent=2) + "\n")
        click.echo(f"Wrote {json_file}")


def _parse_lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise click.UsageError(
            f"--decode-lengths expects numbers like 0,256; got {text!r}."
        ) from error


def _check_suite_options(ctx: click.Context) -> None:
    """Refuse what the suite fixes by itself."""
    given = [
        parameter.opts[0] if isinstance(parameter, click.Option) else "BUNDLE"
        for parameter in ctx.command.params
        if parameter.name is not None
        and parameter.expose_value
        and parameter.name not in _SUITE_OPTIONS
        and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"--suite was given with {', '.join(given)}; it measures models of its own, always "
            "in the same way. Leave that out."
        )


def _run_suite(num_threads: int, folder: Path, *, progress: bool) -> None:
    from dllava_export.benchmark.geometries import SuiteSettings
    from dllava_export.benchmark.report import report_summary, write_report
    from dllava_export.benchmark.suite import run_suite

    report = run_suite(SuiteSettings(num_threads=num_threads), progress=progress)
    paths = write_report(report, folder)
    click.echo(report_summary(report))
    for path in paths:
        click.echo(f"Wrote {path}")
