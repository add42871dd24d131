"""The command line. Each command parses, calls one library function and prints one result.

Results go to stdout; progress, logs and what a command took go to stderr. Exit codes: 0
success, 1 an error that a message explains or a check that failed, 2 wrong usage.
"""

from __future__ import annotations

import logging
import sys

import click

from dllava_export.commands.bench import bench
from dllava_export.commands.build import build
from dllava_export.commands.chat import chat
from dllava_export.commands.doctor import doctor
from dllava_export.commands.evaluate import evaluate
from dllava_export.commands.export import export
from dllava_export.commands.inspect import inspect
from dllava_export.commands.plan import plan
from dllava_export.commands.run import run
from dllava_export.commands.sparsify import sparsify
from dllava_export.commands.train_predictors import train_predictors
from dllava_export.commands.validate import validate
from dllava_export.commands.visualize import visualize
from dllava_export.version import __version__

# Commands import the rest inside their functions, so that --help works without torch, ONNX
# Runtime or TensorRT, and at once.


__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="dllava-export")
@click.option(
    "-v", "--verbose", count=True, help="Say what each stage does; twice for debugging."
)
@click.option(
    "-q", "--quiet", is_flag=True, help="No progress bars, no warnings, not what it took."
)
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


for _command in (
    export,
    sparsify,
    run,
    chat,
    inspect,
    plan,
    bench,
    build,
    validate,
    train_predictors,
    evaluate,
    visualize,
    doctor,
):
    main.add_command(_command)
