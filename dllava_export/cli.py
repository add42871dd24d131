"""The command line. Each command parses, calls one library function and prints one result.

Results go to stdout, progress and logs to stderr. Exit codes: 0 success, 1 an error that a
message explains, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from dllava_export import __version__
from dllava_export.errors import DllavaExportError
from dllava_export.sparsity import POLICIES

# Everything else is imported inside the commands, so that --help works without torch, ONNX
# Runtime or TensorRT, and at once.

__all__ = ["main"]

_RATE = click.FloatRange(0, 1, min_open=True)


class _Command(click.Command):
    """Keeps the example at the end of a docstring as it is written."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"Example:\n\n  {self.epilog}\n")


def _reports_errors(function: Callable[..., None]) -> Callable[..., None]:
    """Print expected errors as one message, with their cause and the pass that raised them."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (DllavaExportError, ValueError) as error:
            if isinstance(error, ValueError) and not _is_ours(error):
                raise
            message = " ".join([str(error), *(f"({note})" for note in _notes(error))])
            raise click.ClickException(message) from error

    return wrapped


def _is_ours(error: ValueError) -> bool:
    """True for a setting that this package refused: the error was raised in its own code."""
    traceback = error.__traceback__
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.startswith("dllava_export")


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _sparsity_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that say what is pruned, shared by `export` and `sparsify`."""
    options = [
        click.option(
            "--policy",
            type=click.Choice(POLICIES),
            help="What scores tokens. predictor is trained; none exports a dense decoder."
            "  [default: predictor]",
        ),
        click.option(
            "--sparse-layer",
            type=click.IntRange(min=1),
            help="First decoder layer, 0-based, that sees only kept tokens."
            "  [default: as trained, else 2]",
        ),
        click.option(
            "--image-keep-rate",
            type=_RATE,
            help="Share of image tokens kept, in (0, 1].  [default: as trained, else 0.2]",
        ),
        click.option(
            "--image-keep-tokens",
            type=click.IntRange(min=1),
            help="Number of image tokens kept, instead of a rate.",
        ),
        click.option(
            "--output-text-keep-rate",
            type=_RATE,
            help="Share of generated tokens whose keys and values stay from the sparse layer "
            "on, in (0, 1]. The predictor decides by its own threshold; the rate then sizes "
            "the cache. 1.0 keeps all.  [default: as trained, else 0.5; 1.0 for norm]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _options_from(values: dict[str, Any]) -> Any:
    from dllava_export.export import SparsityOptions

    if values["image_keep_rate"] is not None and values["image_keep_tokens"] is not None:
        raise click.UsageError("Give --image-keep-rate or --image-keep-tokens, not both.")
    return SparsityOptions(**values)


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
            type=_RATE,
            help="Share of image tokens to keep, in (0, 1].  [default: the checkpoint's, else "
            "0.2]",
        ),
        click.option(
            "--output-text-keep-rate",
            type=_RATE,
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
            type=click.Choice(["fp32", "fp16", "bf16"]),
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


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="dllava-export")
@click.option(
    "-v", "--verbose", count=True, help="Say what each stage does; twice for debugging."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress bars and no warnings.")
@click.pass_context
def main(ctx: click.Context, verbose: int, quiet: bool) -> None:
    """Export LLaVA and Dynamic-LLaVA models to ONNX and run them with pruned tokens.

    Image tokens are pruned in prefill, generated tokens' keys and values in decode, inside
    the exported graph.
    """
    level = logging.ERROR if quiet else logging.WARNING - 10 * min(verbose, 2)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("dllava_export").setLevel(level)
    ctx.obj = {"progress": not quiet and sys.stderr.isatty()}


@main.command(
    cls=_Command, epilog="dllava-export export Osilly/Dynamic-LLaVA-7B out --precision fp16"
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
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Weights and activations; predictors always compute in fp32."
    "  [default: the checkpoint's; fp16 for bf16 ones]",
)
@click.option(
    "--num-decoder-layers",
    type=click.IntRange(min=1),
    help="Export only the first so many decoder layers, to try things out.",
)
@_sparsity_options
@click.pass_obj
@_reports_errors
def export(
    obj: dict[str, Any],
    checkpoint: str,
    out: Path,
    random_weights: bool,
    precision: str | None,
    num_decoder_layers: int | None,
    **sparsity: Any,
) -> None:
    """Export CHECKPOINT (a folder or a hub id) to the bundle OUT.

    Reads original LLaVA-1.5, Dynamic-LLaVA and llava-hf checkpoints. Weights are hard-linked
    where possible, so that a bundle costs next to no disk space.
    """
    options = _options_from(sparsity)

    from dllava_export.checkpoint import random_checkpoint, read_checkpoint
    from dllava_export.export import export as export_bundle

    read = random_checkpoint if random_weights else read_checkpoint
    source = read(checkpoint, num_decoder_layers=num_decoder_layers)
    report = export_bundle(source, out, options, precision=precision, progress=obj["progress"])
    click.echo(report.to_text())


@main.command(
    cls=_Command,
    epilog="dllava-export sparsify dense_out out --policy uniform --image-keep-rate 0.3",
)
@click.argument("dense", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--predictors",
    help="Checkpoint (folder or hub id) to take trained predictors from, where DENSE has none.",
)
@_sparsity_options
@click.pass_obj
@_reports_errors
def sparsify(
    obj: dict[str, Any], dense: Path, out: Path, predictors: str | None, **sparsity: Any
) -> None:
    """Run only the passes: make the bundle OUT from DENSE.

    DENSE is a bundle, or the ONNX file of a dense decoder that any exporter wrote.
    """
    options = _options_from(sparsity)

    from dllava_export.sparsify import sparsify as sparsify_decoder

    report = sparsify_decoder(
        dense, out, options, predictors=predictors, progress=obj["progress"]
    )
    click.echo(report.to_text())


def _check_folder(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written before the work is done, not after it."""
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"folder '{value.parent}' does not exist.")
    return value


def _parse_ids(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.replace(",", " ").split()]
    except ValueError as error:
        raise click.BadParameter(
            f"expected numbers like 1,-200,15,27; got {value!r}"
        ) from error


@main.command(
    cls=_Command, epilog='dllava-export run out --image cat.png --prompt "What is this?"'
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", help="A picture, or none for a text-only prompt.")
@click.option("--prompt", help="The question; the chat template is put around it.")
@click.option(
    "--input-ids",
    callback=_parse_ids,
    help="Token ids instead of --prompt, -200 for the image: 1,-200,15,27.",
)
@click.option(
    "--mode",
    type=click.Choice(["cache", "recompute"]),
    default="cache",
    show_default=True,
    help="With KV cache, or one pass over everything per token.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option("--top-p", type=_RATE, default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="For a temperature above 0.")
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option("--json", "as_json", is_flag=True, help="Print text, tokens and counts as JSON.")
@_reports_errors
def run(
    bundle: Path,
    image: str | None,
    prompt: str | None,
    input_ids: list[int] | None,
    mode: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer a prompt about an image with BUNDLE; text appears as it is generated."""
    if (prompt is None) == (input_ids is None):
        raise click.UsageError("Give either --prompt or --input-ids, one of the two.")

    from dllava_export.session import check_image_choice, load

    session = load(bundle, backend, num_threads=threads)
    picture = check_image_choice(session.manifest, image)

    def show(_: int, token: int, text: str) -> None:
        click.echo(text if session.manifest.chat_template else f"{token} ", nl=False)

    (answer,) = session.generate(
        [picture],
        [prompt] if prompt is not None else None,
        input_ids=[input_ids] if input_ids is not None else None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        mode=mode,
        on_token=None if as_json else show,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(answer), indent=2))
        return
    click.echo()
    click.echo(answer.to_text(), err=True)


@main.command(cls=_Command, epilog="dllava-export inspect out --plot out.png")
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
    callback=_check_folder,
    help="Draw rows and KV bytes per layer into this file (.png, .svg, .pdf).",
)
@_reports_errors
def inspect(
    bundle: Path,
    prompt_len: int,
    output_len: int,
    image_tokens: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Say what BUNDLE is: passes, rows per layer, KV bytes and FLOPs, dense against sparse."""
    from dllava_export.bundle import DECODER, read_manifest
    from dllava_export.inspection import inspect_geometry, plot_report

    manifest = read_manifest(bundle)
    geometry = manifest.geometry
    if image_tokens is not None:
        geometry = dataclasses.replace(geometry, num_image_tokens=image_tokens)
    report = inspect_geometry(
        geometry,
        manifest.sparsity,
        prompt_text_len=prompt_len,
        output_len=output_len,
        passes=manifest.passes[DECODER],
    )
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.to_text())
    if plot is not None:
        plot_report(report, plot)
        click.echo(f"Drew {plot}", err=as_json)


@main.command(cls=_Command, epilog="dllava-export bench out --decode-lengths 0,512,1024")
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
    callback=_check_folder,
    help="Write all numbers to this file too.",
)
@click.pass_obj
@_reports_errors
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


@main.command(
    name="train-predictors",
    cls=_Command,
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
@click.option(
    "--on-bad-record",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help="Stop at the first record that cannot be used, or skip and count them.",
)
@click.option("--resume", is_flag=True, help="Go on from the last training state in OUT.")
@_training_options
@click.pass_obj
@_reports_errors
def train_predictors(
    obj: dict[str, Any],
    checkpoint: str,
    data: Path,
    out: Path,
    image_folder: Path | None,
    on_bad_record: Literal["stop", "skip"],
    resume: bool,
    **settings: Any,
) -> None:
    """Train CHECKPOINT's predictors on DATA and write the Dynamic-LLaVA checkpoint OUT.

    CHECKPOINT is a LLaVA-1.5 or Dynamic-LLaVA folder or hub id; predictors that it lacks start
    at random. DATA is LLaVA's JSON of conversations about images. Language model and projector
    are trained along unless --freeze-model is given. OUT holds the log and a plot of it too.
    """
    from dllava_export import training

    report = training.train_predictors(
        checkpoint,
        data,
        out,
        training.TrainingSettings(**settings),
        image_folder=image_folder,
        on_bad_record=on_bad_record,
        resume=resume,
        progress=obj["progress"],
    )
    click.echo(report.to_text())


@main.command(
    cls=_Command,
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
@click.option("--backend", default="onnxruntime")
@click.option(
    "--threads", "num_threads", type=click.IntRange(min=1), help="Threads of the runtime."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_check_folder,
    help="Write all numbers and answers to this file too.",
)
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_check_folder,
    help="Write the tables to this file too.",
)
@click.pass_obj
@_reports_errors
def evaluate(
    obj: dict[str, Any],
    bundles: tuple[Path, ...],
    data: Path,
    image_folder: Path | None,
    backend: str,
    json_file: Path | None,
    markdown_file: Path | None,
    **settings: Any,
) -> None:
    """Ask BUNDLES the questions in DATA: accuracy, tokens kept, KV bytes and time.

    DATA is LLaVA's JSON of conversations about images, or a question file whose records have an
    answer. An answer is right if it is the truth, letter case and white space aside.
    """
    from dllava_export.evaluation import EvaluationSettings, write_text
    from dllava_export.evaluation import evaluate as evaluate_bundles

    report = evaluate_bundles(
        bundles,
        data,
        EvaluationSettings(**settings),
        image_folder=image_folder,
        backend=backend,
        progress=obj["progress"],
    )
    click.echo(report.to_text())
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_json(), indent=2) + "\n")
        click.echo(f"Wrote {json_file}")
    if markdown_file is not None:
        write_text(markdown_file, report.to_markdown())
        click.echo(f"Wrote {markdown_file}")


@main.command(
    cls=_Command,
    epilog='dllava-export visualize out --image cat.png --prompt "What is this?" -o out.png',
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", help="A picture, or none for a text-only prompt.")
@click.option("--prompt", help="The question; the chat template is put around it.")
@click.option(
    "--input-ids",
    callback=_parse_ids,
    help="Token ids instead of --prompt, -200 for the image: 1,-200,15,27.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_check_folder,
    help="The figure (.png, .svg, .pdf).",
)
@_reports_errors
def visualize(
    bundle: Path,
    image: str | None,
    prompt: str | None,
    input_ids: list[int] | None,
    max_new_tokens: int,
    threads: int | None,
    output: Path,
) -> None:
    """Draw what BUNDLE keeps: patches and their scores, generated tokens, KV cache lengths."""
    if (prompt is None) == (input_ids is None):
        raise click.UsageError("Give either --prompt or --input-ids, one of the two.")

    from dllava_export.visualization import check_format, draw, trace_answer

    check_format(output)
    trace = trace_answer(
        bundle,
        image=image,
        prompt=prompt,
        input_ids=input_ids,
        max_new_tokens=max_new_tokens,
        num_threads=threads,
    )
    draw(trace, output)
    click.echo(f"Drew {output}")


@main.command(cls=_Command, epilog="dllava-export doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_reports_errors
def doctor(as_json: bool) -> None:
    """Report versions, backends found, what is missing and how to get it."""
    from dllava_export.doctor import collect

    report = collect()
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.to_text())
