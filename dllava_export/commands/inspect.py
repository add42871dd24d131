"""`dllava-export inspect`: what a bundle is and what it saves."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dllava_export.commands.command import Command
from dllava_export.commands.options import check_folder

__all__ = ["inspect"]


@click.command(cls=Command, epilog="dllava-export inspect out --plot out.png")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompt-len",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Text tokens of the prompt, beside the image.",
)
@click.option(
    "--output-len",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Generated tokens.",
)
@click.option(
    "--image-tokens",
    type=click.IntRange(min=0),
    help="Image tokens of the prompt.  [default: the bundle's; 0 for a bare decoder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Draw rows and KV bytes per layer into this file (.png, .svg, .pdf).",
)
def inspect(
    bundle: Path,
    prompt_len: int,
    output_len: int,
    image_tokens: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Say what BUNDLE is: passes, rows per layer, KV bytes and FLOPs, dense against sparse."""
    from dllava_export import api
    from dllava_export.cost.inspection_plot import plot_report

    report = api.inspect(
        bundle, prompt_len=prompt_len, output_len=output_len, image_tokens=image_tokens
    )
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.to_text())
    if plot is not None:
        plot_report(report, plot)
        click.echo(f"Drew {plot}", err=as_json)
