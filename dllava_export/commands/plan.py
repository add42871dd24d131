"""`dllava-export plan`: what a bundle takes of a GPU's memory, and the batch that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dllava_export.commands.command import Command
from dllava_export.commands.options import check_folder
from dllava_export.reporting.byte_sizes import parse_bytes

__all__ = ["plan"]


def _parse_memory(_: click.Context, __: click.Parameter, value: str) -> int:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(
    cls=Command,
    epilog="dllava-export plan out --gpu-memory 24GiB --max-input-len 1024 --max-new-tokens 512",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--gpu-memory",
    required=True,
    metavar="SIZE",
    callback=_parse_memory,
    help="Memory to plan for: 24GiB, 16GB.",
)
@click.option(
    "--max-input-len",
    required=True,
    type=click.IntRange(min=1),
    help="Tokens of the longest prompt, those of its image included.",
)
@click.option(
    "--max-new-tokens",
    required=True,
    type=click.IntRange(min=1),
    help="Tokens generated at most.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples at once that the table is for.",
)
@click.option(
    "--image-tokens",
    type=click.IntRange(min=0),
    help="Image tokens of a prompt.  [default: the bundle's; 0 for a bare decoder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes in bytes.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Draw what the memory holds, and the batches that fit (.png, .svg, .pdf).",
)
def plan(
    bundle: Path,
    as_json: bool,
    plot: Path | None,
    **request: Any,
) -> None:
    """Plan BUNDLE on a GPU: cache capacities, memory, largest batch; dense against sparse.

    Nothing is run: weights and caches are exact, activations are estimated from the graphs.
    """
    from dllava_export import api
    from dllava_export.cost.planning_plot import plot_plan
    from dllava_export.reporting.output_files import check_plot_format

    if plot is not None:
        check_plot_format(plot)
    report = api.plan(bundle, **request)
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.to_text())
    if plot is not None:
        plot_plan(report, plot)
        click.echo(f"Drew {plot}", err=as_json)
