"""From a checkpoint to a bundle: trace, transform, attach weights, write."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dllava_export import bundle, resources
from dllava_export.byte_sizes import format_bytes
from dllava_export.errors import BundleError, UnsupportedModelError
from dllava_export.inspection import Geometry, PredictorGeometry
from dllava_export.pipeline import decoder_passes, recompute_passes
from dllava_export.sparsity import Sparsity

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from dllava_export.checkpoint import Checkpoint
    from dllava_export.checkpoint_config import PredictorConfig
    from dllava_export.passes import PassResult, PredictorWeights

__all__ = [
    "ExportReport",
    "SparsityOptions",
    "complete_sparsity",
    "export",
    "predictor_model",
    "resolve_sparsity",
    "transform_decoder",
]

logger = logging.getLogger(__name__)

_Stage = contextlib.AbstractContextManager[None]

_NUM_STAGES = 3
_TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-graphsurgeon")


@dataclasses.dataclass(frozen=True)
class SparsityOptions:
    """What a user asked for; None means: as the checkpoint was trained, else the defaults."""

    policy: str | None = None
    sparse_layer: int | None = None
    image_keep_rate: float | None = None
    image_keep_tokens: int | None = None
    output_text_keep_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: The bundle.
        manifest: Its manifest.
        bytes_linked: Weight bytes shared with the checkpoint's files by hard links.
        bytes_written: Bytes of new files.
        seconds: Wall time.
        warnings: What the user should know.
    """

    folder: Path
    manifest: bundle.Manifest
    bytes_linked: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]

    def to_text(self) -> str:
        """Return a summary: what was written, where, and what it is."""
        sparsity, geometry = self.manifest.sparsity, self.manifest.geometry
        lines = [
            f"Wrote {self.folder} in {self.seconds:.1f} s: "
            f"{format_bytes(self.bytes_written)} new, {format_bytes(self.bytes_linked)} linked",
            f"  decoder   {geometry.num_layers} layers, hidden {geometry.hidden_size}, "
            f"{self.manifest.precision}",
        ]
        if sparsity.is_dense:
            lines.append("  sparsity  none (dense decoder)")
        else:
            text = (
                f"generated text keep rate {sparsity.output_text_keep_rate:g}"
                if sparsity.has_keep_bit
                else "all generated text kept"
            )
            lines.append(
                f"  sparsity  {sparsity.policy}, from layer {sparsity.sparse_layer} on: "
                f"{_kept_image_tokens(sparsity, geometry)} image tokens, {text}"
            )
        names = [bundle.DECODER, bundle.RECOMPUTE]
        visual = (
            f", {bundle.VISUAL_FOLDER}/{bundle.VISUAL}" if self.manifest.has_visual else ""
        )
        lines.append(f"  graphs    {', '.join(f'llm/{name}' for name in names)}{visual}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def resolve_sparsity(
    options: SparsityOptions, checkpoint: Checkpoint, *, num_layers: int
) -> Sparsity:
    """Fill in what the user left open.

    Raises:
        UnsupportedModelError: If predictors are asked for and the checkpoint has none.
        ValueError: If a setting is out of range.
    """
    return complete_sparsity(
        options,
        checkpoint.sparse_config,
        num_layers=num_layers,
        num_image_tokens=checkpoint.num_image_tokens,
        source=f"{checkpoint.path} is a {checkpoint.layout} checkpoint",
        remedy="Use a Dynamic-LLaVA checkpoint",
    )


def complete_sparsity(
    options: SparsityOptions,
    trained: PredictorConfig | None,
    *,
    num_layers: int,
    num_image_tokens: int,
    source: str,
    remedy: str,
) -> Sparsity:
    """Fill in what the user left open, as the predictors were trained.

    Args:
        options: What the user asked for.
        trained: The predictors there are, if any.
        num_layers: Decoder layers.
        num_image_tokens: Rows of an image; 0 where that is known at run time only.
        source: Where predictors were looked for, a clause for messages.
        remedy: How to get predictors, for messages.

    Raises:
        UnsupportedModelError: If predictors are asked for and there are none.
        ValueError: If a setting is out of range.
    """
    policy = options.policy or "predictor"
    if policy == "predictor" and not (trained is not None and trained.use_vision_predictor):
        raise UnsupportedModelError(
            f"{source} without an image predictor, which policy 'predictor' needs. {remedy}, or "
            "a policy that needs no training: --policy random, uniform, norm, or none for a "
            "dense decoder."
        )
    if policy == "none":
        return Sparsity(policy="none", output_text_keep_rate=1.0)
    values: dict[str, Any] = {"policy": policy}
    if trained is not None:
        values["sparse_layer"] = trained.sparse_layer
        values["image_keep_rate"] = trained.vision_keep_rate
        values["output_text_keep_rate"] = trained.output_text_keep_rate
    lacks_text = trained is not None and not trained.has_output_text
    if policy == "norm" or (policy == "predictor" and lacks_text):
        values["output_text_keep_rate"] = 1.0
    values.update({k: v for k, v in dataclasses.asdict(options).items() if v is not None})
    sparsity = Sparsity(**values)
    if sparsity.sparse_layer >= num_layers:
        raise ValueError(
            f"sparse_layer must be in 1..{num_layers - 1} for {num_layers} decoder layers, got "
            f"{sparsity.sparse_layer}."
        )
    if num_image_tokens:
        sparsity.num_kept_image_tokens(num_image_tokens)
    if sparsity.has_keep_bit and policy == "predictor" and lacks_text:
        raise UnsupportedModelError(
            f"{source} without an output-text predictor, but an output text keep rate of "
            f"{sparsity.output_text_keep_rate} was asked for. Use 1.0."
        )
    return sparsity


def export(
    checkpoint: Checkpoint,
    out: str | Path,
    options: SparsityOptions | None = None,
    *,
    precision: str | None = None,
    link: bool = True,
    progress: bool = False,
) -> ExportReport:
    """Export a checkpoint to a bundle.

    Args:
        checkpoint: From `read_checkpoint` or `random_checkpoint`.
        out: New or empty folder.
        options: Sparsification; by default as trained.
        precision: `fp32`, `fp16` or `bf16`; by default the checkpoint's, with fp16 in place of
            bf16, which ONNX Runtime does not run on a CPU.
        link: Hard-link weights where possible instead of copying them.
        progress: Show a progress bar on stderr.

    Raises:
        DllavaExportError: If the checkpoint or the folder is not usable.
        ValueError: If a setting is out of range.
    """
    with resources.stage("loading PyTorch"):
        import torch

        from dllava_export.tracing import trace_decoder, trace_visual
        from dllava_export.weights import attach_weights, write_embedding

    start = time.perf_counter()
    sparsity = resolve_sparsity(
        options or SparsityOptions(),
        checkpoint,
        num_layers=checkpoint.text_config.num_hidden_layers,
    )
    default = "fp16" if checkpoint.precision == "bf16" else checkpoint.precision
    precision = precision or default
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise ValueError(f"precision must be one of {', '.join(dtypes)}, got {precision!r}.")
    with bundle.new_bundle(Path(out)) as folder:
        llm, visual = folder / bundle.LLM_FOLDER, folder / bundle.VISUAL_FOLDER
        llm.mkdir()
        visual.mkdir()
        with show_stages(progress, _NUM_STAGES) as stage:
            with stage("tracing the decoder"):
                dense = trace_decoder(checkpoint, dtypes[precision])
            with stage("tracing the vision tower"):
                visual_model = trace_visual(checkpoint, dtypes[precision])
            with stage("sparsifying"):
                predictors = predictor_model(checkpoint)
                models, passes = transform_decoder(
                    dense, sparsity, predictor_weights(predictors, checkpoint)
                )
            sources = {bundle.DENSE_DECODER: dense}
            if predictors is not None:
                sources[bundle.PREDICTORS] = predictors
            # First in line, so that the data file is the same whatever the sparsity.
            models = sources | models
        with resources.stage("attaching weights"):
            llm_report = attach_weights(
                models, llm, checkpoint.tensors, link=link, progress=progress
            )
            visual_report = attach_weights(
                {bundle.VISUAL: visual_model}, visual, checkpoint.tensors, link=link
            )
            embedding = write_embedding(
                llm,
                checkpoint.tensors["model.embed_tokens.weight"],
                _numpy_dtype(precision),
                link=link,
            )
        with resources.stage("writing graphs"):
            save_models(llm, models)
            save_models(visual, {bundle.VISUAL: visual_model})
        _write_json(visual / "preprocessor_config.json", checkpoint.preprocessor)
        template, eos, warnings = _copy_tokenizer(checkpoint, llm)
        manifest = bundle.Manifest(
            layout=checkpoint.layout,
            precision=precision,
            geometry=_geometry(checkpoint, precision),
            max_position_embeddings=checkpoint.text_config.max_position_embeddings,
            sparsity=sparsity,
            image_token_id=checkpoint.image_token_id,
            image_aspect_ratio=checkpoint.image_aspect_ratio,
            has_visual=True,
            embedding=embedding,
            chat_template=template,
            eos_token_ids=eos,
            tensors={
                **describe_tensors(bundle.LLM_FOLDER, models),
                **describe_tensors(bundle.VISUAL_FOLDER, {bundle.VISUAL: visual_model}),
            },
            passes=passes,
            producer=tool_versions(),
            source=str(checkpoint.path),
        )
        with resources.stage("digests and manifest"):
            bundle.write_manifest(folder, manifest)
        written = bytes_of_new_files(folder)
    return ExportReport(
        Path(out),
        manifest,
        llm_report.bytes_linked + visual_report.bytes_linked,
        written,
        time.perf_counter() - start,
        tuple(warnings),
    )


def describe_tensors(
    folder: str, models: Mapping[str, onnx.ModelProto]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return inputs and outputs of each graph under `folder/name`, as a manifest lists them."""
    return {
        f"{folder}/{name}": {
            "inputs": [_describe(value) for value in model.graph.input],
            "outputs": [_describe(value) for value in model.graph.output],
        }
        for name, model in models.items()
        if model.graph.output  # a file of initializers only is no graph
    }


def _describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return {"name": value.name, "dtype": str(dtype), "shape": shape}


def predictor_model(checkpoint: Checkpoint) -> onnx.ModelProto | None:
    """Return a model of initializers only: the checkpoint's predictors, in their own dtype."""
    import onnx

    from dllava_export.weights import reference_tensor

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
    from dllava_export.passes import PredictorWeights

    if predictors is None or checkpoint.sparse_config is None:
        return None
    tensors = {tensor.name: tensor for tensor in predictors.graph.initializer}
    return PredictorWeights(tensors, checkpoint.sparse_config.nhead)


def transform_decoder(
    dense: onnx.ModelProto, sparsity: Sparsity, weights: PredictorWeights | None
) -> tuple[dict[str, onnx.ModelProto], dict[str, list[dict[str, Any]]]]:
    """Make the decoder with and without KV cache from a dense one.

    Returns:
        Models by file name, and what each pass did, by file name.
    """
    from dllava_export.passes import graph_from_model, model_from_graph, run_passes

    models, applied = {}, {}
    for name, passes in (
        (bundle.DECODER, decoder_passes(sparsity, weights)),
        (bundle.RECOMPUTE, recompute_passes(sparsity, weights)),
    ):
        graph = graph_from_model(dense)
        applied[name] = [_pass_entry(result) for result in run_passes(graph, passes)]
        models[name] = model_from_graph(graph)
    return models, applied


def save_models(folder: Path, models: Mapping[str, onnx.ModelProto]) -> None:
    """Write models whose weights are external already."""
    for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString())


def tool_versions() -> dict[str, str]:
    """Return the versions of this toolkit and of the tools that shape its output."""
    from dllava_export import __version__

    versions = {"dllava-export": __version__}
    for tool in _TOOLS:
        versions[tool] = importlib.metadata.version(tool)
    return versions


def bytes_of_new_files(folder: Path) -> int:
    """Return the bytes of files that are no hard links to something else."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def _pass_entry(result: PassResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "parameters": result.settings,
        "modified": result.modified,
        "num_nodes": result.num_nodes,
    }


def _numpy_dtype(precision: str) -> np.dtype:
    import ml_dtypes
    import numpy as np

    types = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    return np.dtype(types[precision])


def _geometry(checkpoint: Checkpoint, precision: str) -> Geometry:
    config, trained = checkpoint.text_config, checkpoint.sparse_config
    predictor = None
    if trained is not None:
        predictor = PredictorGeometry(
            trained.d_model, trained.nhead, trained.dim_feedforward, trained.num_layers
        )
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None  # LlamaConfig fills both in
    return Geometry(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        num_image_tokens=checkpoint.num_image_tokens,
        bytes_per_value=4 if precision == "fp32" else 2,
        predictor=predictor,
    )


def _copy_tokenizer(
    checkpoint: Checkpoint, llm: Path
) -> tuple[Literal["vicuna_v1", "checkpoint"] | None, tuple[int, ...], list[str]]:
    """Copy tokenizer and configuration; return (template, end-of-sequence ids, warnings)."""
    config = checkpoint.config
    _write_json(llm / "config.json", config)
    generation = checkpoint.path / "generation_config.json"
    for path in (*checkpoint.tokenizer_files, *([generation] if generation.is_file() else [])):
        shutil.copyfile(path, llm / path.name)
    eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id", 2))
    ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (int(eos),))
    if not checkpoint.has_tokenizer:
        warning = (
            f"{checkpoint.path} has no tokenizer: the bundle takes and returns token ids "
            "(`run --input-ids`)."
        )
        return None, ids, [warning]
    return "checkpoint" if checkpoint.layout == "llava-hf" else "vicuna_v1", ids, []


def _kept_image_tokens(sparsity: Sparsity, geometry: Geometry) -> str:
    if geometry.num_image_tokens:
        kept = sparsity.num_kept_image_tokens(geometry.num_image_tokens)
        return f"{kept} of {geometry.num_image_tokens}"
    if sparsity.image_keep_tokens is not None:
        return str(sparsity.image_keep_tokens)
    return f"{sparsity.image_keep_rate:.3g} of the"


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def show_stages(enabled: bool, total: int) -> Iterator[Callable[[str], _Stage]]:
    """Show which of `total` stages work is in, on stderr; tracing cannot tell how far it is.

    What it yields takes the name of a stage, and gives the block that is the stage.
    """
    from tqdm import tqdm

    form = "{desc} {bar} {n}/{total} [{elapsed}]"
    with tqdm(total=total, disable=not enabled, bar_format=form) as bar:

        def stage(name: str) -> _Stage:
            bar.set_description(f"{name:28}")
            bar.update()
            return resources.stage(name)

        yield stage


def referenced_files(models: Iterable[onnx.ModelProto]) -> set[str]:
    """Return the external data files that models refer to.

    Raises:
        BundleError: If a file lies outside the model's folder.
    """
    files = set()
    for model in models:
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if "location" in entries:
                files.add(entries["location"])
    for name in files:
        if Path(name).name != name:
            raise BundleError(f"Weights in {name!r}: expected a file beside the model.")
    return files


def link_or_copy(source: Path, target: Path) -> int:
    """Hard-link a file where possible, else copy it; return the bytes that were copied."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)
        return target.stat().st_size
    return 0
