"""The training loop: steps, progress, log, training state, and what is written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from dllava_export.checkpoints.checkpoint import Checkpoint, read_checkpoint
from dllava_export.errors import SettingError
from dllava_export.families.template_choice import choose_template
from dllava_export.json_text import parse_json
from dllava_export.prompts.images import ImageProcessor
from dllava_export.prompts.tokenizer import ChatTokenizer
from dllava_export.training.data import Batch, ConversationData, DataOrder, OnBadRecord
from dllava_export.training.model import PREDICTORS, Losses, TrainingModel, build_model
from dllava_export.training.output import CONFIG, write_checkpoint
from dllava_export.training.plot import plot_training
from dllava_export.training.settings import TrainingError, TrainingSettings, resolve_predictors
from dllava_export.training.state import STATE_FILE, checkpoint_digest, load_state, save_state

if TYPE_CHECKING:
    from tqdm import tqdm

    from dllava_export.geometry import PredictorConfig


__all__ = ["StepReport", "TrainingReport", "train_predictors"]

LOG_FILE = "training_log.jsonl"
PLOT_FILE = "training_log.png"
logger = logging.getLogger(__name__)

_TEMPLATE = "vicuna_v1"
_NUM_FINAL_STEPS = 20
# May differ from when the run was started: they do not change what is computed.
_FREE_SETTINGS = ("checkpoint_every", "device", "precision", "gradient_checkpointing")


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step, as in the log.

    Attributes:
        step: Steps done, 1-based.
        loss: Sum of the three below.
        ce_loss: Cross entropy of the answers' tokens.
        image_mask_loss: Weighted keep-rate loss of images.
        text_mask_loss: Weighted keep-rate loss of answers.
        image_keep_rate: Share of image tokens kept; None without images or predictor.
        text_keep_rate: Share of tokens kept in long answers; None without any.
        tau: Temperature of the decisions.
        predictor_lr: Learning rate of the predictors.
        model_lr: Learning rate of the model.
        grad_norm: Norm of all gradients, before they were scaled down.
        seconds: Wall time of the step.
    """

    step: int
    loss: float
    ce_loss: float
    image_mask_loss: float
    text_mask_loss: float
    image_keep_rate: float | None
    text_keep_rate: float | None
    tau: float
    predictor_lr: float
    model_lr: float
    grad_norm: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """What a run did.

    Attributes:
        folder: The checkpoint written.
        precision: Of its weights.
        num_bytes: Of its weights.
        num_steps: Steps in all, those before an interruption included.
        num_resumed: Steps that were done before this call.
        num_records: Usable records.
        skipped: Why each of the others is not.
        final: Means over the last steps; `seconds` and rates as in `StepReport`.
        num_final: Steps of those means.
        predictors: What was trained, or None.
        seconds: Wall time of this call.
    """

    folder: Path
    precision: str
    num_bytes: int
    num_steps: int
    num_resumed: int
    num_records: int
    skipped: tuple[str, ...]
    final: StepReport
    num_final: int
    predictors: PredictorConfig | None
    seconds: float

    def to_text(self) -> str:
        """Return a summary: what was written where, final losses and keep rates, time."""
        final, resumed = self.final, ""
        if self.num_resumed:
            resumed = f" ({self.num_resumed} of them before this run)"
        lines = [
            f"Wrote {self.folder} in {self.seconds:.1f} s: {self.precision} checkpoint, "
            f"{self.num_bytes / 2**20:.1f} MiB of weights",
            f"  trained   {self.num_steps} steps{resumed} on {self.num_records} records, "
            f"{len(self.skipped)} skipped",
            f"  losses    cross entropy {final.ce_loss:.4f}{self._mask_losses()}; mean of the "
            f"last {self.num_final} steps",
        ]
        if self.predictors is not None:
            rates = [("image tokens", final.image_keep_rate, self.predictors.vision_keep_rate)]
            if self.predictors.has_output_text:
                target = self.predictors.output_text_keep_rate
                rates.append(("answer tokens", final.text_keep_rate, target))
            kept = ", ".join(
                f"{'none counted' if rate is None else f'{rate:.1%}'} of {what} "
                f"(target {target:.1%})"
                for what, rate, target in rates
            )
            lines.append(f"  kept      {kept}")
        lines.append(f"  log       {self.folder / LOG_FILE}, {self.folder / PLOT_FILE}")
        lines += [f"skipped: {message}" for message in self.skipped[:5]]
        if len(self.skipped) > 5:
            lines.append(f"skipped: and {len(self.skipped) - 5} more")
        return "\n".join(lines)

    def _mask_losses(self) -> str:
        if self.predictors is None:
            return ""
        text = f", text {self.final.text_mask_loss:.4f}"
        return f", keep rates: image {self.final.image_mask_loss:.4f}" + (
            text if self.predictors.has_output_text else ""
        )


OnStep = Callable[[StepReport], None]


def train_predictors(
    checkpoint: Checkpoint | str | Path,
    data: str | Path,
    out: str | Path,
    settings: TrainingSettings | None = None,
    *,
    image_folder: str | Path | None = None,
    allow_outside: bool = False,
    on_bad_record: OnBadRecord = "stop",
    resume: bool = False,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> TrainingReport:
    """Train predictors, and the model around them, and write a Dynamic-LLaVA checkpoint.

    With `settings.train_predictors` false the same loop trains a plain LLaVA, and writes one.

    Args:
        checkpoint: To start from: a folder or hub id, or from `read_checkpoint` or
            `random_checkpoint`. Predictors that it has are trained further.
        data: LLaVA's conversation JSON.
        out: New or empty folder, or that of the run to resume.
        settings: Of the run.
        image_folder: What names of images start from; the folder of `data` by default.
        allow_outside: Take images outside that folder.
        on_bad_record: `stop` at the first record that cannot be used, or `skip` them.
        resume: Go on from the last training state in `out`; from the start without one.
        progress: Show progress bars on stderr.
        on_step: Called after each step.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        TrainingError: If data, `out` or the state in it cannot be used, or the loss is no
            longer a number.
        BadRecordError: If a record is bad and `on_bad_record` is `stop`.
        SettingError: If a setting is impossible for this checkpoint.
    """
    start = time.perf_counter()
    settings = settings or TrainingSettings()
    if isinstance(checkpoint, str | Path):
        checkpoint = read_checkpoint(checkpoint)
    predictors = resolve_predictors(settings, checkpoint)
    device = _device(settings)
    folder = _prepare_folder(Path(out), resume)
    records = _read_data(
        checkpoint, Path(data), settings, image_folder, allow_outside, on_bad_record, progress
    )
    identity = {
        **{
            key: value
            for key, value in dataclasses.asdict(settings).items()
            if key not in _FREE_SETTINGS
        },
        "data (SHA-256)": records.digest[:12],
        "usable records": len(records.records),
        "checkpoint (SHA-256 of its tensors' names)": checkpoint_digest(checkpoint),
    }
    state = load_state(folder, identity)
    with _deterministic(device):
        model = build_model(checkpoint, predictors, settings, device)
        run = _Run(model, records, settings, identity)
        if state is not None:
            run.restore(state)
        num_resumed = run.step
        run.train(folder, progress, on_step)
    num_bytes = write_checkpoint(
        folder, model, checkpoint, predictors, settings, progress=progress
    )
    entries = _read_log(folder / LOG_FILE)
    plot_training(entries, predictors, folder / PLOT_FILE)
    (folder / STATE_FILE).unlink(missing_ok=True)
    final = entries[-_NUM_FINAL_STEPS:]
    return TrainingReport(
        folder=folder,
        precision=settings.precision or checkpoint.weight_format.name,
        num_bytes=num_bytes,
        num_steps=run.num_steps,
        num_resumed=num_resumed,
        num_records=len(records.records),
        skipped=tuple(records.skipped),
        final=_mean(final),
        num_final=len(final),
        predictors=predictors,
        seconds=time.perf_counter() - start,
    )


class _Run:
    """What changes from step to step."""

    def __init__(
        self,
        model: TrainingModel,
        records: ConversationData,
        settings: TrainingSettings,
        identity: dict[str, Any],
    ) -> None:
        self.step = 0
        self.num_steps = settings.num_steps(len(records.records))
        self._model = model
        self._records = records
        self._settings = settings
        self._identity = identity
        self._device = next(model.parameters()).device
        self._optimizer = _optimizer(model, settings)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._order = DataOrder(len(records.records), settings.seed)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a stored state."""
        self.step = state["step"]
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(state["parameters"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self._order.position = state["position"]
        self._records.skipped[:] = state["skipped"]

    def train(self, folder: Path, progress: bool, on_step: OnStep | None) -> None:
        """Do all steps that are left; log each, and save the state now and then."""
        from tqdm import tqdm

        samples = self._records.samples(self._order)
        settings = self._settings
        every = settings.checkpoint_every
        with (
            _open_log(folder / LOG_FILE, self.step) as log,
            tqdm(
                total=self.num_steps, initial=self.step, desc="training", disable=not progress
            ) as bar,
        ):
            while self.step < self.num_steps:
                batches = [
                    Batch.from_samples([next(samples) for _ in range(settings.batch_size)])
                    for _ in range(settings.accumulation_steps)
                ]
                report = self._train_step(batches)
                log.write(json.dumps(dataclasses.asdict(report)) + "\n")
                log.flush()
                is_last = self.step == self.num_steps  # in case writing the result fails
                if every and (is_last or self.step % every == 0):
                    save_state(folder, self._state())
                _show(bar, report)
                if on_step is not None:
                    on_step(report)

    def _train_step(self, batches: Sequence[Batch]) -> StepReport:
        start = time.perf_counter()
        settings = self._settings
        tau = settings.tau(self.step, self.num_steps)
        factor = settings.lr_factor(self.step, self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest_lr"] * factor
        losses = []
        for batch in batches:
            loss = self._model(batch.to(self._device), tau, self._generator)
            if not math.isfinite(float(loss.total.detach())):
                raise TrainingError(
                    f"The loss of step {self.step + 1} is {float(loss.total.detach())}, "
                    f"expected a number; the records were {'; '.join(batch.names)}. Lower the "
                    "learning rates, or look at these records."
                )
            (loss.total / len(batches)).backward()
            losses.append(loss)
        parameters = [parameter for _, parameter in self._trained()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return StepReport(
            step=self.step,
            **_mean_losses(losses),
            tau=tau,
            predictor_lr=settings.predictor_lr * factor if settings.train_predictors else 0.0,
            model_lr=0.0 if settings.freeze_model else settings.model_lr * factor,
            grad_norm=float(norm),
            seconds=time.perf_counter() - start,
        )

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self._identity,
            "step": self.step,
            "parameters": {name: parameter.detach() for name, parameter in self._trained()},
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "position": self._order.position,
            "skipped": list(self._records.skipped),
        }


def _device(settings: TrainingSettings) -> torch.device:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"device {name!r} cannot be used ({reason}), expected cpu, cuda or auto. "
            "`python -c 'import torch; print(torch.cuda.is_available())'` tells whether torch "
            "has CUDA."
        ) from error
    return device


def _prepare_folder(out: Path, resume: bool) -> Path:
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; expected a folder. Choose another name.")
    if resume and (out / CONFIG).is_file():
        raise TrainingError(
            f"{out} holds a finished checkpoint, there is nothing to resume. Choose another "
            "folder to train further."
        )
    if not resume and out.is_dir() and any(out.iterdir()):
        remedy = "Choose another name or remove it"
        if (out / STATE_FILE).is_file():
            remedy = "Go on with --resume, choose another name or remove it"
        raise TrainingError(
            f"{out} is a folder with files in it; expected a new or empty folder. {remedy}."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"{out} cannot be made ({error.strerror}). Choose a folder you may write."
        ) from error
    return out


def _read_data(
    checkpoint: Checkpoint,
    path: Path,
    settings: TrainingSettings,
    image_folder: str | Path | None,
    allow_outside: bool,
    on_bad_record: OnBadRecord,
    progress: bool,
) -> ConversationData:
    if not checkpoint.has_tokenizer:
        raise TrainingError(
            f"{checkpoint.path} has no tokenizer, expected tokenizer.json or tokenizer.model. "
            "Copy the tokenizer files there."
        )
    template = choose_template(
        None, checkpoint.spec.chat_template, checkpoint.config, checkpoint.path
    )
    if template.name != _TEMPLATE:
        logger.warning(
            "%s is prompted with the chat template %s, and trained with %s",
            checkpoint.path,
            template.name,
            _TEMPLATE,
        )
    context = checkpoint.spec.max_position_embeddings
    stated = checkpoint.config.get("tokenizer_model_max_length")
    if type(stated) is int:
        context = min(context, stated)
    return ConversationData.read(
        path,
        image_folder=None if image_folder is None else Path(image_folder),
        allow_outside=allow_outside,
        needs_image=settings.train_predictors,
        tokenizer=ChatTokenizer.from_folder(
            checkpoint.path,
            template=_TEMPLATE,
            image_token_id=checkpoint.spec.image_token_id,
        ),
        image_processor=ImageProcessor.from_config(
            checkpoint.preprocessor, checkpoint.spec.image_aspect_ratio
        ),
        num_image_tokens=checkpoint.spec.num_image_tokens,
        max_length=settings.max_length or context,
        vocab_size=checkpoint.spec.text_config.vocab_size,
        on_bad_record=on_bad_record,
        progress=progress,
    )


def _optimizer(model: TrainingModel, settings: TrainingSettings) -> torch.optim.AdamW:
    """Return AdamW over {predictors, rest} x {matrices, biases and norms}."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.startswith(PREDICTORS), parameter.ndim > 1
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "highest_lr": settings.predictor_lr if is_predictor else settings.model_lr,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (is_predictor, decays), parameters in groups.items()
        ]
    )


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA ask for kernels that give the same bits each time; on the CPU all do."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextlib.contextmanager
def _open_log(path: Path, num_steps: int) -> Iterator[IO[str]]:
    """Open the log behind the steps done so far; what was logged after them goes away."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if num_steps else []
    with path.open("w", encoding="utf-8") as log:
        log.writelines(lines[:num_steps])
        log.flush()
        yield log


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
        return [parse_json(line) for line in lines]
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}), expected one JSON object per step. Restore it, "
            "or start anew in another folder."
        ) from error


def _mean_losses(losses: Sequence[Losses]) -> dict[str, Any]:
    """Return the fields of `StepReport` that come from the losses of one step."""

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    def rate(values: list[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return mean(found) if found else None

    return {
        "loss": mean([float(loss.total.detach()) for loss in losses]),
        "ce_loss": mean([float(loss.ce.detach()) for loss in losses]),
        "image_mask_loss": mean([float(loss.image_mask.detach()) for loss in losses]),
        "text_mask_loss": mean([float(loss.text_mask.detach()) for loss in losses]),
        "image_keep_rate": rate([loss.image_keep_rate for loss in losses]),
        "text_keep_rate": rate([loss.text_keep_rate for loss in losses]),
    }


def _mean(entries: Sequence[dict[str, Any]]) -> StepReport:
    """Return the mean of log entries; `step` is that of the last one."""
    values: dict[str, Any] = {}
    for key in entries[-1]:
        found = [entry[key] for entry in entries if entry[key] is not None]
        values[key] = math.fsum(found) / len(found) if found else None
    return StepReport(**{**values, "step": entries[-1]["step"]})


def _show(bar: tqdm, report: StepReport) -> None:
    shown = {
        "ce": report.ce_loss,
        "image": report.image_mask_loss,
        "text": report.text_mask_loss,
        "image kept": report.image_keep_rate,
        "text kept": report.text_keep_rate,
    }
    bar.set_postfix(
        {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
    )
    bar.update()
