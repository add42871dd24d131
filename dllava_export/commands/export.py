"""`dllava-export export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dllava_export.commands.command import Command
from dllava_export.commands.options import check_keep, link_option, sparsity_options
from dllava_export.families.chat_templates import named_templates
from dllava_export.precision import NUMBER_FORMATS

__all__ = ["export"]


@click.command(
    cls=Command, epilog="dllava-export export Osilly/Dynamic-LLaVA-7B out --precision fp16"
)
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--random-weights",
    is_flag=True,
    help="CHECKPOINT is a config.json: export its model with random weights, to try and time.",
)
@click.option(
    "--precision",
    type=click.Choice(list(NUMBER_FORMATS)),
    help="Weights and activations; predictors always compute in fp32."
    "  [default: the checkpoint's; fp16 for bf16 ones]",
)
@click.option(
    "--num-decoder-layers",
    type=click.IntRange(min=1),
    help="Export only the first so many decoder layers, to try things out.",
)
@click.option(
    "--chat-template",
    metavar=f"{'|'.join(named_templates())}|FILE",
    help="How the model was taught to read conversations, FILE a jinja2 template."
    "  [default: what the checkpoint says, else a guess]",
)
@link_option
@sparsity_options
@click.pass_obj
def export(
    obj: dict[str, Any],
    /,
    checkpoint: str,
    out: Path,
    random_weights: bool,
    precision: str | None,
    num_decoder_layers: int | None,
    chat_template: str | None,
    link: bool,
    **sparsity: Any,
) -> None:
    """Export CHECKPOINT (a folder or a hub id) to the bundle OUT.

    Reads original LLaVA-1.5, Dynamic-LLaVA and llava-hf checkpoints. Weights are copied, or
    share the checkpoint's blocks where the file system can (btrfs, XFS).
    """
    check_keep(sparsity)

    from dllava_export import api

    report = api.export(
        checkpoint,
        out,
        random_weights=random_weights,
        precision=precision,
        num_decoder_layers=num_decoder_layers,
        chat_template=chat_template,
        link=link,
        progress=obj["progress"],
        **sparsity,
    )
    click.echo(report.to_text())
