"""`dllava-export evaluate`: ask bundles questions whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dllava_export.commands.options import (
    BackendCommand,
    allow_outside,
    backend_options,
    check_folder,
    given_backend_options,
)
from dllava_export.commands.registry_choice import RegistryChoice
from dllava_export.evaluation.metrics.table import METRICS
from dllava_export.passes.policies.registry import POLICIES

if TYPE_CHECKING:
    from dllava_export.evaluation.report import WhichAnswers


__all__ = ["evaluate"]


def _numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",") if value)
    except ValueError as error:
        raise click.BadParameter(f"expected numbers like 32,64,115; got {value!r}") from error


class _MetricOption(click.Option):
    """The option whose help says of all metrics what is right, and where they count."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return names and help text."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        metrics = "; ".join(f"{metric.name}: {metric.help}" for metric in METRICS)
        chosen = "; ".join(f"{m.name} for {m.chosen_for}" for m in METRICS if m.chosen_for)
        return record[0], f"{record[1]} {metrics}.  [default: the first of {chosen}]"


@click.command(
    cls=BackendCommand,
    context_settings={"show_default": True},
    epilog="dllava-export evaluate out out_random questions.json --image-folder images",
)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--image-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What names of images in DATA start from.  [default: DATA's folder]",
)
@click.option(
    "--answers",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with the answers, by question_id.  [default: they stand in DATA]",
)
@click.option(
    "--metric",
    cls=_MetricOption,
    type=click.Choice([metric.name for metric in METRICS]),
    help="How answers are judged.",
)
@allow_outside
@click.option(
    "--on-bad-record",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help="Stop at the first record that cannot be used, or skip and count them.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Ask only the first so many questions."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Tokens of an answer at most.  [default: 16 more than the longest truth]",
)
@click.option(
    "--mode",
    type=click.Choice(["cache", "recompute"]),
    default="cache",
    help="With KV cache, or one pass over everything per token.",
)
@click.option(
    "--image-keep-tokens",
    metavar="NUMBER,...",
    default="",
    show_default=False,
    callback=_numbers,
    help="Sweep: ask each of BUNDLES sparsified to each number of image tokens, 32,64,115 for "
    "example, and its dense decoder.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=RegistryChoice("policy", POLICIES.names),
    help="Policy of the sweep; may be given several times.  [default: that of each bundle]",
)
@backend_options
@click.option(
    "--show-answers",
    type=click.Choice(["all", "wrong"]),
    help="Print questions, truths and answers first: all, or where a bundle is wrong.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Write all numbers and answers to this file too.",
)
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Write the tables to this file too.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="Draw the sweep: accuracy against tokens kept and against time (.png, .svg, .pdf).",
)
@click.pass_obj
def evaluate(
    obj: dict[str, Any],
    /,
    bundles: tuple[Path, ...],
    data: Path,
    image_folder: Path | None,
    answers: Path | None,
    backend: str,
    show_answers: WhichAnswers | None,
    json_file: Path | None,
    markdown_file: Path | None,
    plot: Path | None,
    **settings: Any,
) -> None:
    """Ask BUNDLES the questions in DATA: accuracy, tokens kept, KV bytes and time.

    DATA is LLaVA's JSON of conversations about images, or a question file of LLaVA or lmms-eval,
    JSON or JSONL. Accuracies have 95 % confidence intervals.
    """
    from dllava_export import api
    from dllava_export.evaluation.sweep_plot import plot_sweep
    from dllava_export.reporting.output_files import check_plot_format, write_text

    if not settings["image_keep_tokens"] and (plot is not None or settings["policies"]):
        raise click.UsageError(
            "--policy and --plot are for a sweep; give --image-keep-tokens, 32,64,115 for "
            "example."
        )
    if plot is not None:
        check_plot_format(plot)
    report = api.evaluate(
        bundles,
        data,
        image_folder=image_folder,
        answers=answers,
        backend=backend,
        backend_options=given_backend_options(),
        progress=obj["progress"],
        **settings,
    )
    if show_answers is not None:
        click.echo(report.answers_text(show_answers))
    click.echo(report.to_text())
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_json(), indent=2) + "\n")
        click.echo(f"Wrote {json_file}")
    if markdown_file is not None:
        write_text(markdown_file, report.to_markdown())
        click.echo(f"Wrote {markdown_file}")
    if plot is not None:
        plot_sweep(report, plot)
        click.echo(f"Drew {plot}")
