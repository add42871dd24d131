"""`dllava-export bench`: time a bundle against its dense form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dllava_export.commands.command import Command
from dllava_export.commands.options import check_folder

__all__ = ["bench"]


@click.command(cls=Command, epilog="dllava-export bench out --decode-lengths 0,512,1024")
@click.argument("bundle", type=click.Path(path_type=Path))
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
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Write all numbers to this file too.",
)
@click.pass_obj
def bench(
    obj: dict[str, Any],
    bundle: Path,
    prompt_len: int,
    decode_lengths: str,
    batch_size: int,
    threads: int,
    rounds: int,
    json_file: Path | None,
) -> None:
    """Time BUNDLE against its dense form and transformers, in one run, as ratios."""
    from dllava_export.bench import BenchSettings, run_bench

    try:
        lengths = tuple(sorted({int(part) for part in decode_lengths.split(",")}))
    except ValueError as error:
        raise click.UsageError(
            f"--decode-lengths expects numbers like 0,256; got {decode_lengths!r}."
        ) from error
    settings = BenchSettings(prompt_len, lengths, batch_size, threads, rounds)
    report = run_bench(bundle, settings, progress=obj["progress"])
    click.echo(report.to_text())
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        click.echo(f"Wrote {json_file}")
