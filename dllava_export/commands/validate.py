"""`dllava-export validate`: compare what a bundle computes with what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dllava_export.commands.options import (
    BackendCommand,
    backend_options,
    check_folder,
    given_backend_options,
)

__all__ = ["validate"]

_TOLERANCE = click.FloatRange(min=0)


@click.command(
    cls=BackendCommand,
    context_settings={"show_default": True},
    epilog="dllava-export validate out --against torch --checkpoint llava-v1.5-7b --layers",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_options
@click.option(
    "--against",
    type=click.Choice(["onnxruntime", "dense", "torch"]),
    default="onnxruntime",
    help="What it is compared with; see above.",
)
@click.option("--checkpoint", help="Folder or hub id, for --against torch.")
@click.option("--image", help="A picture for --prompt; none for a text-only prompt.")
@click.option("--prompt", help="The question.  [default: random pixels and tokens]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of random values.")
@click.option(
    "--steps",
    "num_steps",
    type=click.IntRange(min=1),
    default=16,
    help="Tokens fed back one by one, the same on both sides.",
)
@click.option(
    "--layers",
    is_flag=True,
    help="Compare keys, values and hidden states of every layer, to see where it starts. "
    "On a GPU it is keys and values alone.",
)
@click.option(
    "--rtol",
    type=_TOLERANCE,
    help="Relative tolerance.  [default: 1e-4 for fp32, 0.03 for fp16, 0.1 for bf16]",
)
@click.option(
    "--atol",
    type=_TOLERANCE,
    help="Absolute tolerance.  [default: 2e-4 for fp32, 0.03 for fp16, 0.1 for bf16]",
)
@click.option(
    "--check-error-stat",
    type=click.Choice(["elemwise", "max", "mean", "median", "quantile"]),
    default="elemwise",
    help="Which statistic of the errors must keep a tolerance.",
)
@click.option(
    "--margin",
    type=_TOLERANCE,
    help="A token whose score is this close to the decision may be kept by one side alone."
    "  [default: 1e-3 for fp32, 0.01 for fp16, 0.1 for bf16]",
)
@click.option(
    "--threads", "num_threads", type=click.IntRange(min=1), help="Threads of the runtimes."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Write every comparison to this file too.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Draw errors over layers and steps into this file (.png, .svg, .pdf).",
)
@click.option(
    "--save-inputs",
    type=click.Path(file_okay=False, path_type=Path),
    callback=check_folder,
    help="Write what is fed to each graph to this new folder first, for `polygraphy run "
    "--load-inputs`.",
)
@click.pass_context
def validate(
    ctx: click.Context,
    /,
    bundle: Path,
    image: str | None,
    prompt: str | None,
    json_file: Path | None,
    plot: Path | None,
    save_inputs: Path | None,
    **settings: Any,
) -> None:
    """Compare what BUNDLE computes with what it should; exit code 1 if it does not.

    Prefill, decode steps and recompute are run on both sides, with the same tokens.

    \b
    --against onnxruntime  the portable graphs of the bundle, as they are on disk; for engines
                           and CUDA ONNX Runtime on the CPU. Finds errors of a backend.
    --against torch        the checkpoint, in PyTorch, dropped tokens masked instead of
                           removed. Finds errors of the export.
    --against dense        the dense decoder of the bundle. What is computed before anything
                           is dropped must be equal, and all of it at keep rates of 1.0; what
                           comes after is drift: measured, and no error.

    A token kept by one side alone is an error, unless its score is a near-tie (--margin). What
    follows a difference in kept tokens is measured too, not judged.
    """  # noqa: D301  click wants a backspace
    from dllava_export import api
    from dllava_export.reporting.output_files import check_plot_format, write_text

    if (settings["against"] == "torch") != (settings["checkpoint"] is not None):
        raise click.UsageError("--against torch and --checkpoint go together.")
    if plot is not None:
        check_plot_format(plot)
    settings["backend_options"] = given_backend_options()
    if save_inputs is not None:
        from dllava_export.validation.graph_inputs import save_graph_inputs
        from dllava_export.validation.settings import ValidationSettings

        chosen = ValidationSettings(**settings)
        # Before the comparison: they are wanted most where that one fails.
        saved = save_graph_inputs(bundle, save_inputs, chosen, image=image, prompt=prompt)
        click.echo(f"{saved.to_text()}\n")
    report = api.validate(bundle, image=image, prompt=prompt, **settings)
    click.echo(report.to_text())
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_json(), indent=2) + "\n")
        click.echo(f"Wrote {json_file}")
    if plot is not None:
        from dllava_export.validation.plot import plot_drift

        plot_drift(report, plot)
        click.echo(f"Drew {plot}")
    if not report.passed:
        ctx.exit(1)
