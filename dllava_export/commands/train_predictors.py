"""`dllava-export train-predictors`: train predictors on conversations about images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from dllava_export.commands.command import Command
from dllava_export.commands.options import RATE, allow_outside
from dllava_export.precision import NUMBER_FORMATS

__all__ = ["train_predictors"]


def _training_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options of `train-predictors` that are fields of `TrainingSettings`."""
    count, amount = click.IntRange(min=1), click.FloatRange(min=0)
    options = [
        click.option("--steps", type=count, help="Optimizer steps, instead of --epochs."),
        click.option(
            "--epochs",
            type=click.FloatRange(0, min_open=True),
            default=1.0,
            help="Passes over the data.",
        ),
        click.option("--batch-size", type=count, default=8, help="Records at once."),
        click.option(
            "--accumulation-steps", type=count, default=1, help="Batches that make one step."
        ),
        click.option(
            "--predictor-lr", type=amount, default=2e-4, help="Learning rate of predictors."
        ),
        click.option(
            "--model-lr",
            type=amount,
            default=5e-6,
            help="Learning rate of language model and projector.",
        ),
        click.option(
            "--warmup-ratio",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.03,
            help="Share of the steps in which learning rates rise.",
        ),
        click.option("--freeze-model", is_flag=True, help="Train the predictors alone."),
        click.option(
            "--sparse-layer",
            type=count,
            help="First decoder layer, 0-based, that sees only kept tokens."
            "  [default: the checkpoint's, else 2]",
        ),
        click.option(
            "--image-keep-rate",
            type=RATE,
            help="Share of image tokens to keep, in (0, 1].  [default: the checkpoint's, else "
            "0.2]",
        ),
        click.option(
            "--output-text-keep-rate",
            type=RATE,
            help="Share of answer tokens to keep, in (0, 1].  [default: the checkpoint's, else "
            "0.5]",
        ),
        click.option(
            "--min-answer-tokens",
            type=count,
            default=50,
            help="Answers shorter than this are kept whole.",
        ),
        click.option(
            "--max-length",
            type=count,
            help="Tokens of a record, image included.  [default: the checkpoint's context]",
        ),
        click.option("--seed", type=click.IntRange(min=0), default=0),
        click.option(
            "--precision",
            type=click.Choice(list(NUMBER_FORMATS)),
            help="Of the checkpoint written.  [default: the checkpoint's]",
        ),
        click.option(
            "--compute-precision",
            type=click.Choice(["fp32", "bf16"]),
            help="bf16 is mixed precision.  [default: bf16 on CUDA, else fp32]",
        ),
        click.option(
            "--gradient-checkpointing",
            is_flag=True,
            help="Compute layers twice instead of storing what they computed.",
        ),
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:1."),
        click.option(
            "--checkpoint-every",
            type=click.IntRange(min=0),
            default=500,
            help="Steps between two training states, for --resume; 0 for none.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    name="train-predictors",
    cls=Command,
    context_settings={"show_default": True},
    epilog="dllava-export train-predictors llava-v1.5-7b chats.json out --freeze-model",
)
@click.argument("checkpoint")
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--image-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What names of images in DATA start from.  [default: DATA's folder]",
)
@allow_outside
@click.option(
    "--on-bad-record",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help="Stop at the first record that cannot be used, or skip and count them.",
)
@click.option("--resume", is_flag=True, help="Go on from the last training state in OUT.")
@_training_options
@click.pass_obj
def train_predictors(
    obj: dict[str, Any],
    /,
    checkpoint: str,
    data: Path,
    out: Path,
    image_folder: Path | None,
    allow_outside: bool,
    on_bad_record: Literal["stop", "skip"],
    resume: bool,
    **settings: Any,
) -> None:
    """Train CHECKPOINT's predictors on DATA and write the Dynamic-LLaVA checkpoint OUT.

    CHECKPOINT is a LLaVA-1.5 or Dynamic-LLaVA folder or hub id; predictors that it lacks start
    at random. DATA is LLaVA's JSON of conversations about images. Language model and projector
    are trained along unless --freeze-model is given. OUT holds the log and a plot of it too.
    """
    from dllava_export import api

    report = api.train_predictors(
        checkpoint,
        data,
        out,
        image_folder=image_folder,
        allow_outside=allow_outside,
        on_bad_record=on_bad_record,
        resume=resume,
        progress=obj["progress"],
        **settings,
    )
    click.echo(report.to_text())
