"""The public functions: what the command line calls, and what `import dllava_export` offers.

Each imports what it needs when it is called. Settings that a function takes as `**settings`
are fields of the dataclass that its documentation names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from dllava_export.backends.registry import DEFAULT_BACKEND
from dllava_export.boundary import raises_expected_errors_only
from dllava_export.extras import missing_packages_explained
from dllava_export.settings import settings_from

if TYPE_CHECKING:
    from dllava_export.benchmark.bench_report import BenchReport
    from dllava_export.checkpoints.checkpoint import Checkpoint
    from dllava_export.cost.inspection import InspectionReport
    from dllava_export.cost.planning import MemoryPlan
    from dllava_export.evaluation.answer_trace import AnswerTrace
    from dllava_export.evaluation.report import EvaluationReport
    from dllava_export.exporting.report import ExportReport
    from dllava_export.training.loop import TrainingReport
    from dllava_export.validation.report import ValidationReport

__all__ = [
    "bench",
    "build",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "sparsify",
    "train_predictors",
    "validate",
    "visualize",
]

P = ParamSpec("P")
R = TypeVar("R")
StrPath = str | Path


def _needs_extra(extra: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a package that is missing be explained by an error of ours."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def explained(*args: P.args, **kwargs: P.kwargs) -> R:
            with missing_packages_explained(function.__name__, extra):
                return function(*args, **kwargs)

        return explained

    return decorated


@raises_expected_errors_only
@_needs_extra("export")
def export(
    checkpoint: StrPath | Checkpoint,
    out: StrPath,
    *,
    policy: str | None = None,
    output_text_policy: str | None = None,
    sparse_layer: int | None = None,
    image_keep_rate: float | None = None,
    image_keep_tokens: int | None = None,
    output_text_keep_rate: float | None = None,
    precision: str | None = None,
    num_decoder_layers: int | None = None,
    chat_template: str | None = None,
    random_weights: bool = False,
    link: bool = False,
    progress: bool = False,
) -> ExportReport:
    """Export a checkpoint to a bundle: graphs, weights and everything that runs them.

    Args:
        checkpoint: A folder, a hub id (`owner/name`, downloaded), or what `read_checkpoint`
            returned.
        out: New or empty folder.
        policy: What scores image tokens; by default `predictor`, which a Dynamic-LLaVA
            checkpoint has.
        output_text_policy: What decides about generated tokens, or `none`, which keeps all; by
            default `policy`, where it can.
        sparse_layer: First decoder layer, 0-based, that sees only kept tokens; as trained, else
            2, by default.
        image_keep_rate: Share of image tokens kept, in (0, 1]; as trained, else 0.2.
        image_keep_tokens: Number of image tokens kept, instead of a rate.
        output_text_keep_rate: Share of generated tokens whose keys and values stay, in (0, 1];
            as trained, else 0.5.
        precision: `fp32`, `fp16` or `bf16`; the checkpoint's by default, fp16 for bf16 ones.
        num_decoder_layers: Export only the first so many decoder layers.
        chat_template: How the model was taught to read conversations: `vicuna_v1`, `llama_2`,
            `mistral_instruct`, `chatml`, `plain`, `checkpoint` (its own template), or a file
            with a jinja2 template; what the checkpoint says by default, and where it says
            nothing, a guess with a warning.
        random_weights: `checkpoint` is a config.json: export its model with random weights.
        link: Hard-link weights where possible. onnx, and tools that read models through it,
            refuse such a bundle. By default weights are copied, or cloned where the file
            system can.
        progress: Show a progress bar on stderr.

    Returns:
        What was written where; `print(report.to_text())`.

    Raises:
        CheckpointError: If the checkpoint is not found, damaged or incomplete.
        UnsupportedModelError: If it is a model of another kind.
        BundleError: If `out` cannot be written.
        SettingError: If a setting is out of range.
        MissingPackageError: If PyTorch or ONNX Script is not installed.
    """
    from dllava_export.checkpoints.checkpoint import (
        Checkpoint,
        random_checkpoint,
        read_checkpoint,
    )
    from dllava_export.exporting.exporter import export_checkpoint
    from dllava_export.exporting.options import SparsityOptions
    from dllava_export.reporting.resources import stage

    options = SparsityOptions(
        policy=policy,
        output_text_policy=output_text_policy,
        sparse_layer=sparse_layer,
        image_keep_rate=image_keep_rate,
        image_keep_tokens=image_keep_tokens,
        output_text_keep_rate=output_text_keep_rate,
    )
    if isinstance(checkpoint, Checkpoint):
        source = checkpoint
    else:
        read = random_checkpoint if random_weights else read_checkpoint
        with stage("reading headers"):
            source = read(checkpoint, num_decoder_layers=num_decoder_layers)
    return export_checkpoint(
        source,
        out,
        options,
        precision=precision,
        chat_template=chat_template,
        link=link,
        progress=progress,
    )


@raises_expected_errors_only
@_needs_extra("export")
def sparsify(
    dense: StrPath,
    out: StrPath,
    *,
    policy: str | None = None,
    output_text_policy: str | None = None,
    sparse_layer: int | None = None,
    image_keep_rate: float | None = None,
    image_keep_tokens: int | None = None,
    output_text_keep_rate: float | None = None,
    predictors: StrPath | None = None,
    link: bool = False,
    progress: bool = False,
) -> ExportReport:
    """Run only the passes: make a bundle from a bundle, or from somebody else's dense decoder.

    Args:
        dense: A bundle, dense or sparse (it holds its dense decoder either way), or an `.onnx`
            file with a dense decoder that takes `input_ids` or `inputs_embeds`, and
            `position_ids`.
        out: New or empty folder.
        policy: See `export`.
        output_text_policy: See `export`.
        sparse_layer: See `export`.
        image_keep_rate: See `export`.
        image_keep_tokens: See `export`.
        output_text_keep_rate: See `export`.
        predictors: Checkpoint, a folder or hub id, whose trained predictors are used; those of
            the bundle by default.
        link: See `export`; weights of an `.onnx` file are never linked.
        progress: Show a progress bar on stderr.

    Returns:
        What was written where.

    Raises:
        UnsupportedModelError: If the decoder is of a kind that the passes do not know.
        BundleError: If `dense` is no bundle, or `out` cannot be written.
        SettingError: If a setting is out of range.
    """
    from dllava_export.exporting.options import SparsityOptions
    from dllava_export.exporting.sparsifier import sparsify_decoder

    options = SparsityOptions(
        policy=policy,
        output_text_policy=output_text_policy,
        sparse_layer=sparse_layer,
        image_keep_rate=image_keep_rate,
        image_keep_tokens=image_keep_tokens,
        output_text_keep_rate=output_text_keep_rate,
    )
    return sparsify_decoder(
        dense, out, options, predictors=predictors, link=link, progress=progress
    )


@raises_expected_errors_only
@_needs_extra("export")
def build(
    bundle: StrPath,
    backend: str,
    *,
    dry_run: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Any:
    """Build engines of a bundle's graphs, beside them.

    Args:
        bundle: The bundle.
        backend: `tensorrt`, which needs the GPU it builds for, or `tensorrt-rtx`, which needs
            none, or another that builds.
        dry_run: Work out shapes, capacities and memory only; needs no TensorRT.
        progress: Show a progress bar on stderr.
        **settings: Fields of `BuildOptions`.

    Returns:
        A report with `to_text()` and `to_json()`.

    Raises:
        BackendError: If the backend builds nothing, or is not installed.
        EngineBuildError: If it refuses a graph or cannot build it.
        BundleError: If the bundle is incomplete or changed.
        SettingError: If settings do not fit the model or each other.
    """
    from dllava_export.backends.registry import BACKENDS

    factory = BACKENDS.get(backend)
    return factory.build(Path(bundle), settings, dry_run=dry_run, progress=progress)


@raises_expected_errors_only
@_needs_extra("export")
def validate(
    bundle: StrPath, *, image: str | None = None, prompt: str | None = None, **settings: Any
) -> ValidationReport:
    """Compare what a bundle computes with what it should.

    Args:
        bundle: The bundle.
        image: A picture for `prompt`, or `none` for a text-only one.
        prompt: The question; random pixels and tokens where None.
        **settings: Fields of `ValidationSettings`: `against="torch"` and `checkpoint` compare
            with PyTorch, `layers=True` every layer.

    Returns:
        A report; `passed` says whether all that is judged agrees.

    Raises:
        BackendError: If the backend cannot run the bundle.
        BundleError: If the bundle is incomplete or changed.
        CheckpointError: If the checkpoint cannot be read.
        InvalidInputError: If prompt or checkpoint do not fit the bundle.
        SettingError: If a setting is out of range.
        MissingPackageError: If polygraphy or PyTorch is not installed.
    """
    from dllava_export.validation.settings import ValidationSettings
    from dllava_export.validation.validate import validate_bundle

    chosen = settings_from(ValidationSettings, settings)
    return validate_bundle(bundle, chosen, image=image, prompt=prompt)


@raises_expected_errors_only
def evaluate(
    bundles: StrPath | Sequence[StrPath],
    data: StrPath,
    *,
    image_folder: StrPath | None = None,
    answers: StrPath | None = None,
    backend: str = DEFAULT_BACKEND,
    backend_options: Mapping[str, Any] | None = None,
    progress: bool = False,
    **settings: Any,
) -> EvaluationReport:
    """Ask one or several bundles the same questions and compare their answers with the truth.

    Args:
        bundles: The bundles.
        data: LLaVA's JSON of conversations about images, or a question file of LLaVA or
            lmms-eval, JSON or JSONL.
        image_folder: What names of images start from; the folder of `data` by default.
        answers: A file with the answers, by `question_id`; by default they stand in `data`.
        backend: As `load` takes it.
        backend_options: The backend's own, as `load` takes them.
        progress: Show a progress bar on stderr.
        **settings: Fields of `EvaluationSettings`.

    Returns:
        Accuracy by question type with 95 % intervals, tokens kept, KV bytes and time of each
        bundle.

    Raises:
        EvaluationError: If the file or a record of it cannot be used, or a bundle has no
            tokenizer or no vision tower.
        BundleError: If a folder is no bundle.
        BackendError: If the backend cannot run one.
        SettingError: If a setting is out of range.
    """
    from dllava_export.evaluation.evaluate import evaluate_bundles
    from dllava_export.evaluation.settings import EvaluationSettings

    folders = [bundles] if isinstance(bundles, str | Path) else bundles
    chosen = settings_from(EvaluationSettings, settings)
    return evaluate_bundles(
        folders,
        data,
        chosen,
        image_folder=image_folder,
        answers=answers,
        backend=backend,
        progress=progress,
        **(backend_options or {}),
    )


@raises_expected_errors_only
def inspect(
    bundle: StrPath,
    *,
    prompt_len: int = 64,
    output_len: int = 256,
    image_tokens: int | None = None,
) -> InspectionReport:
    """Say what a bundle is, and what sparsification saves by formula.

    Args:
        bundle: The bundle.
        prompt_len: Text tokens of the prompt, beside the image.
        output_len: Generated tokens, at least 1.
        image_tokens: Image tokens of a prompt; the bundle's by default.

    Returns:
        Passes, rows per layer, KV bytes and FLOPs, dense against sparse.

    Raises:
        BundleError: If the bundle is incomplete or changed.
        SettingError: If the settings do not fit the model.
    """
    from dllava_export.cost.inspection import inspect_bundle

    return inspect_bundle(
        bundle,
        prompt_text_len=prompt_len,
        output_len=output_len,
        num_image_tokens=image_tokens,
    )


@raises_expected_errors_only
def plan(bundle: StrPath, **request: Any) -> MemoryPlan:
    """Work out what a bundle takes of a GPU's memory, and the largest batch that fits.

    Nothing is run: weights and caches are exact, activations are estimated from the graphs.

    Args:
        bundle: The bundle.
        **request: Fields of `PlanRequest`: `gpu_memory` in bytes, `max_input_len`,
            `max_new_tokens`, `batch_size`, `image_tokens`.

    Raises:
        BundleError: If the bundle is incomplete or changed.
        UnsupportedModelError: If shapes of a graph are not known.
        SettingError: If the lengths do not fit the model, or the memory not one sample.
    """
    from dllava_export.cost.planning import PlanRequest, plan_memory

    return plan_memory(bundle, settings_from(PlanRequest, request))


@raises_expected_errors_only
@_needs_extra("export")
def bench(bundle: StrPath, *, progress: bool = False, **settings: Any) -> BenchReport:
    """Time a bundle against its dense form and transformers, in one run, interleaved.

    Args:
        bundle: A bundle with a vision tower; of any policy.
        progress: Show a progress bar on stderr.
        **settings: Fields of `BenchSettings`.

    Returns:
        Times, memory and KV bytes; ratios are what to compare.

    Raises:
        BackendError: If the backend cannot run the bundle.
        BundleError: If the bundle is incomplete or changed.
        SettingError: If there is no such setting.
    """
    from dllava_export.benchmark.bench import run_bench
    from dllava_export.benchmark.bench_settings import BenchSettings

    return run_bench(bundle, settings_from(BenchSettings, settings), progress=progress)


@raises_expected_errors_only
def visualize(
    bundle: StrPath,
    output: StrPath,
    *,
    prompt: str | None = None,
    image: str | None = None,
    input_ids: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    backend: str = DEFAULT_BACKEND,
    **options: Any,
) -> AnswerTrace:
    """Answer a prompt and draw what was kept: patches, scores, generated tokens, cache lengths.

    Args:
        bundle: The bundle.
        output: The figure; its suffix (.png, .svg, .pdf) is its format.
        prompt: The question.
        image: A picture, or `none` for a text-only prompt.
        input_ids: Token ids instead of `prompt`, -200 for the image.
        max_new_tokens: Tokens generated at most.
        backend: As `load` takes it.
        **options: The backend's own, as `load` takes them.

    Returns:
        What was drawn.

    Raises:
        BackendError: If the backend cannot run the bundle.
        InvalidInputError: If prompt and image do not fit the bundle or each other, or the
            figure cannot be written.
        CapacityError: If the prompt is too long.
        SettingError: If a setting is out of range.
    """
    from dllava_export.evaluation.answer_trace import trace_answer
    from dllava_export.evaluation.picture import draw
    from dllava_export.reporting.output_files import check_plot_format

    check_plot_format(output)
    trace = trace_answer(
        bundle,
        image=image,
        prompt=prompt,
        input_ids=input_ids,
        max_new_tokens=max_new_tokens,
        backend=backend,
        **options,
    )
    draw(trace, output)
    return trace


@raises_expected_errors_only
@_needs_extra("train")
def train_predictors(
    checkpoint: StrPath | Checkpoint,
    data: StrPath,
    out: StrPath,
    *,
    image_folder: StrPath | None = None,
    allow_outside: bool = False,
    on_bad_record: Literal["stop", "skip"] = "stop",
    resume: bool = False,
    progress: bool = False,
    **settings: Any,
) -> TrainingReport:
    """Train predictors on conversations about images, and write a Dynamic-LLaVA checkpoint.

    Args:
        checkpoint: To start from: a folder, a hub id, or what `read_checkpoint` returned.
        data: LLaVA's JSON of conversations about images.
        out: New or empty folder, or that of the run to resume.
        image_folder: What names of images start from; the folder of `data` by default.
        allow_outside: Take images that lie outside that folder.
        on_bad_record: `stop` at the first record that cannot be used, or `skip` them.
        resume: Go on from the last training state in `out`.
        progress: Show progress bars on stderr.
        **settings: Fields of `TrainingSettings`.

    Returns:
        What was trained and written.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        TrainingError: If data, `out` or the state in it cannot be used, or the loss is no
            longer a number.
        BadRecordError: If a record is bad and `on_bad_record` is `stop`.
        SettingError: If a setting is impossible for this checkpoint.
        MissingPackageError: If PyTorch is not installed.
    """
    from dllava_export.training.loop import train_predictors as train
    from dllava_export.training.settings import TrainingSettings

    return train(
        checkpoint,
        data,
        out,
        settings_from(TrainingSettings, settings),
        image_folder=image_folder,
        allow_outside=allow_outside,
        on_bad_record=on_bad_record,
        resume=resume,
        progress=progress,
    )
