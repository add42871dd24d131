"""`dllava-export sparsify`: a dense decoder becomes a sparse bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dllava_export.commands.command import Command
from dllava_export.commands.options import check_keep, link_option, sparsity_options

__all__ = ["sparsify"]


@click.command(
    cls=Command,
    epilog="dllava-export sparsify dense_out out --policy uniform --image-keep-rate 0.3",
)
@click.argument("dense", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--predictors",
    help="Checkpoint (folder or hub id) to take trained predictors from, where DENSE has none.",
)
@link_option
@sparsity_options
@click.pass_obj
def sparsify(
    obj: dict[str, Any],
    /,
    dense: Path,
    out: Path,
    predictors: str | None,
    link: bool,
    **sparsity: Any,
) -> None:
    """Run only the passes: make the bundle OUT from DENSE.

    DENSE is a bundle, or the ONNX file of a dense decoder that any exporter wrote.
    """
    check_keep(sparsity)

    from dllava_export import api

    report = api.sparsify(
        dense, out, predictors=predictors, link=link, progress=obj["progress"], **sparsity
    )
    click.echo(report.to_text())
