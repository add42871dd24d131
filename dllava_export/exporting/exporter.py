"""From a checkpoint to a bundle: trace, transform, attach weights, write."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.bundle_writer import BundleWriter
from dllava_export.bundles.files import describe_tensors, save_models, tool_versions
from dllava_export.bundles.manifest import Manifest, write_manifest
from dllava_export.errors import BundleError
from dllava_export.exporting.options import SparsityOptions, complete_sparsity
from dllava_export.exporting.report import ExportReport
from dllava_export.exporting.transform import transform_decoder
from dllava_export.families.chat_templates import (
    CHECKPOINT_TEMPLATE,
    TEMPLATE_FILE,
    Conversation,
    JinjaTemplate,
    find_template,
)
from dllava_export.families.special_token_ids import contradictions, end_ids, stated_ids
from dllava_export.families.template_choice import TemplateChoice, choose_template
from dllava_export.precision import BF16, FP16, Precision
from dllava_export.reporting import resources
from dllava_export.reporting.output_folders import new_folder
from dllava_export.reporting.stages import show_stages
from dllava_export.sparsity import Sparsity

if TYPE_CHECKING:
    import onnx

    from dllava_export.checkpoints.checkpoint import Checkpoint
    from dllava_export.passes.policies.weights import PredictorWeights


__all__ = ["export_checkpoint", "predictor_model", "resolve_sparsity"]

logger = logging.getLogger(__name__)


_NUM_STAGES = 3


def resolve_sparsity(
    options: SparsityOptions, checkpoint: Checkpoint, *, num_layers: int
) -> Sparsity:
    """Fill in what the user left open.

    Raises:
        UnsupportedModelError: If predictors are asked for and the checkpoint has none.
        SettingError: If a setting is out of range.
    """
    return complete_sparsity(
        options,
        checkpoint.spec.predictors,
        num_layers=num_layers,
        num_image_tokens=checkpoint.spec.num_image_tokens,
        source=f"{checkpoint.path} is a {checkpoint.spec.layout} checkpoint",
        remedy="Use a Dynamic-LLaVA checkpoint",
    )


def export_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    options: SparsityOptions | None = None,
    *,
    precision: str | None = None,
    chat_template: str | None = None,
    link: bool = False,
    progress: bool = False,
) -> ExportReport:
    """Export a checkpoint to a bundle.

    Args:
        checkpoint: From `read_checkpoint` or `random_checkpoint`.
        out: New or empty folder.
        options: Sparsification; by default as trained.
        precision: `fp32`, `fp16` or `bf16`; by default the checkpoint's, with fp16 in place of
            bf16, which ONNX Runtime does not run on a CPU.
        chat_template: How conversations are written: a name of `families.chat_templates`,
            `checkpoint`, or a file with a jinja2 template; what the checkpoint says by default.
        link: Hard-link weights where possible. onnx, and tools that read models through it,
            refuse such a bundle. By default weights are copied, or cloned where the file
            system can.
        progress: Show a progress bar on stderr.

    Raises:
        DllavaExportError: If the checkpoint or the folder is not usable.
        SettingError: If a setting is out of range.
    """
    with resources.stage("loading PyTorch"):
        from dllava_export.exporting.tracing import trace_decoder, trace_visual
        from dllava_export.exporting.weights import attach_weights, write_embedding

    start = time.perf_counter()
    spec = checkpoint.spec
    sparsity = resolve_sparsity(
        options or SparsityOptions(),
        checkpoint,
        num_layers=spec.num_layers,
    )
    template = choose_template(
        chat_template,
        spec.chat_template,
        checkpoint.config,
        checkpoint.path,
        is_known=checkpoint.has_predictors,
    )
    stored = checkpoint.weight_format
    chosen = Precision.of(precision or (FP16 if stored == BF16 else stored).name)
    writer = BundleWriter(link=link, progress=progress)
    with new_folder(Path(out), sources=_folders(checkpoint)) as folder:
        llm, visual = folder / layout.LLM_FOLDER, folder / layout.VISUAL_FOLDER
        llm.mkdir()
        visual.mkdir()
        with show_stages(progress, _NUM_STAGES) as stage:
            with stage("tracing the decoder"):
                dense = trace_decoder(checkpoint, chosen.activations.torch)
            with stage("tracing the vision tower"):
                visual_model = trace_visual(checkpoint, chosen.activations.torch)
            with stage("sparsifying"):
                predictors = predictor_model(checkpoint)
                models, passes = transform_decoder(
                    dense, sparsity, predictor_weights(predictors, checkpoint)
                )
            sources = {layout.DENSE_DECODER: dense}
            if predictors is not None:
                sources[layout.PREDICTORS] = predictors
            # First in line, so that the data file is the same whatever the sparsity.
            models = sources | models
        with resources.stage("attaching weights"):
            attach_weights(models, llm, checkpoint.tensors, writer=writer)
            attach_weights(
                {layout.VISUAL: visual_model}, visual, checkpoint.tensors, writer=writer
            )
            embedding = write_embedding(
                llm,
                checkpoint.tensors[names.TOKEN_EMBEDDING],
                chosen.weights.numpy,
                writer=writer,
            )
        with resources.stage("writing graphs"):
            save_models(llm, models)
            save_models(visual, {layout.VISUAL: visual_model})
        _write_json(visual / "preprocessor_config.json", checkpoint.preprocessor)
        eos, warnings = _copy_tokenizer(checkpoint, llm, template)
        manifest = Manifest(
            family=checkpoint.family.name,
            layout=spec.layout,
            precision=chosen,
            geometry=spec.geometry,
            max_position_embeddings=spec.max_position_embeddings,
            sparsity=sparsity,
            image_token_id=spec.image_token_id,
            image_aspect_ratio=spec.image_aspect_ratio,
            has_visual=True,
            embedding=embedding,
            chat_template=template.name if checkpoint.has_tokenizer else None,
            eos_token_ids=eos,
            tensors={
                **describe_tensors(layout.LLM_FOLDER, models),
                **describe_tensors(layout.VISUAL_FOLDER, {layout.VISUAL: visual_model}),
            },
            passes=passes,
            producer=tool_versions(),
            source=str(checkpoint.path),
        )
        with resources.stage("digests and manifest"):
            write_manifest(folder, manifest, writer.digest_of)
        written = writer.bytes_written(folder)
    seconds = time.perf_counter() - start
    return ExportReport.of(Path(out), manifest, writer, written, seconds, tuple(warnings))


def _folders(checkpoint: Checkpoint) -> set[Path]:
    """Return the folders that weights are read from."""
    return {source.file.parent for source in checkpoint.tensors.values() if source.file}


def predictor_model(checkpoint: Checkpoint) -> onnx.ModelProto | None:
    """Return a model of initializers only: the checkpoint's predictors, in their own dtype."""
    import onnx

    from dllava_export.exporting.weights import reference_tensor

    tensors = [
        reference_tensor(name, source)
        for name, source in checkpoint.tensors.items()
        if name.startswith(("image_predictor.", "output_text_predictor."))
    ]
    if not tensors:
        return None
    graph = onnx.helper.make_graph([], "predictors", [], [], initializer=tensors)
    return onnx.helper.make_model(graph)


def predictor_weights(
    predictors: onnx.ModelProto | None, checkpoint: Checkpoint
) -> PredictorWeights | None:
    """Return predictors as the passes take them."""
    from dllava_export.passes.policies.weights import PredictorWeights

    if predictors is None or checkpoint.spec.predictors is None:
        return None
    tensors = {tensor.name: tensor for tensor in predictors.graph.initializer}
    return PredictorWeights(tensors, checkpoint.spec.predictors.nhead)


def _copy_tokenizer(
    checkpoint: Checkpoint, llm: Path, template: TemplateChoice
) -> tuple[tuple[int, ...], list[str]]:
    """Copy tokenizer, template and configuration; return (end-of-sequence ids, warnings)."""
    _write_json(llm / "config.json", checkpoint.config)
    generation = checkpoint.path / "generation_config.json"
    for path in (*checkpoint.tokenizer_files, *([generation] if generation.is_file() else [])):
        shutil.copyfile(path, llm / path.name)
    if template.source is not None:
        (llm / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
    stated = stated_ids(llm)
    warnings = contradictions(stated, checkpoint.spec.geometry.vocab_size)
    if not checkpoint.has_tokenizer:
        warnings = [
            f"{checkpoint.path} has no tokenizer: the bundle takes and returns token ids "
            "(`run --input-ids`)."
        ]
    else:
        warnings += [w for w in (template.warning, _template_failure(llm, template)) if w]
    # LLaMA's, where no file says it.
    return end_ids(stated) or (2,), warnings


def _template_failure(llm: Path, template: TemplateChoice) -> str | None:
    """Return what is wrong with a template of jinja2, or None."""
    source = find_template(llm) if template.name == CHECKPOINT_TEMPLATE else None
    if source is None:
        return None
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    try:
        JinjaTemplate(source, str(llm), tokens).render(Conversation(["?"], image="before"))
    except BundleError as error:
        return str(error)
    return None


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
