"""Only the passes: from a dense decoder, ours or somebody else's, to a sparse bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.bundle_writer import BundleWriter
from dllava_export.bundles.files import (
    describe_tensors,
    referenced_files,
    save_models,
    tool_versions,
)
from dllava_export.bundles.graph_facts import check_graphs
from dllava_export.bundles.manifest import Manifest, read_manifest, write_manifest
from dllava_export.errors import BundleError, UnsupportedModelError
from dllava_export.exporting.exporter import predictor_model
from dllava_export.exporting.foreign_decoder import damage_explained, read_decoder
from dllava_export.exporting.options import (
    SparsityOptions,
    complete_sparsity,
    untrained_choices,
)
from dllava_export.exporting.report import ExportReport
from dllava_export.exporting.transform import transform_decoder
from dllava_export.families.config_file import read_json
from dllava_export.families.config_kinds import DECODER_KINDS
from dllava_export.families.llava import predictor_config
from dllava_export.geometry import Geometry, PredictorConfig, PredictorGeometry
from dllava_export.passes.policies.registry import POLICIES
from dllava_export.precision import NUMBER_FORMATS, Precision, format_of_dtype
from dllava_export.reporting import resources
from dllava_export.reporting.output_folders import new_folder
from dllava_export.reporting.stages import show_stages
from dllava_export.sparsity import DENSE

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from dllava_export.passes.decoder_layers import DecoderLayer
    from dllava_export.passes.policies.weights import PredictorWeights


__all__ = ["sparsify_decoder"]

logger = logging.getLogger(__name__)

_NUM_STAGES = 3
_PREDICTOR_DATA = "predictors.onnx.data"
_WIDTH_TENSORS = (  # norms over the decoder's hidden states
    "image_predictor.down_mlp.0.weight",
    "output_text_predictor.output_mlp.0.weight",
)
_CONFIG_FILES = ("config.json", "generation_config.json")
_DEFAULT_MAX_POSITIONS = 2048
_LEFT_INPUTS = (names.INPUTS_EMBEDS, names.POSITION_IDS, names.TOKEN_KIND)


@dataclasses.dataclass(frozen=True)
class _Predictors:
    """Trained predictors: how they were trained, and their weights as initializers."""

    config: PredictorConfig
    model: onnx.ModelProto

    def weights(self) -> PredictorWeights:
        """Return them as the passes take them."""
        from dllava_export.passes.policies.weights import PredictorWeights

        tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        return PredictorWeights(tensors, self.config.nhead)

    def hidden_size(self) -> int:
        """Return the width of the hidden states they were trained on."""
        shapes = {t.name: tuple(t.dims) for t in self.model.graph.initializer}
        return next(shapes[name][0] for name in _WIDTH_TENSORS if name in shapes)


@dataclasses.dataclass(frozen=True)
class _DenseDecoder:
    """Where to start from; the manifest describes it as it is, dense and with no passes."""

    model: onnx.ModelProto
    manifest: Manifest
    predictors: _Predictors | None
    warnings: tuple[str, ...] = ()


def sparsify_decoder(
    dense: str | Path,
    out: str | Path,
    options: SparsityOptions | None = None,
    *,
    predictors: str | Path | None = None,
    link: bool = False,
    progress: bool = False,
) -> ExportReport:
    """Sparsify a dense decoder; no checkpoint is read, but for predictors.

    Args:
        dense: A bundle, dense or sparse (it holds its dense decoder either way), or an `.onnx`
            file with a dense decoder that takes `input_ids` or `inputs_embeds`, and
            `position_ids`.
        out: New or empty folder.
        options: Sparsification; by default as the predictors were trained.
        predictors: Checkpoint, a folder or hub id, whose trained predictors are used. By
            default those of the bundle, if it has any.
        link: Hard-link the weights of a bundle where possible. onnx, and tools that read models
            through it, refuse such a bundle. By default weights are copied, or cloned where
            the file system can; those of an `.onnx` file always are.
        progress: Show a progress bar on stderr.

    Raises:
        DllavaExportError: If the decoder, the predictors or the folder are not usable.
        SettingError: If a setting is out of range.
    """
    start = time.perf_counter()
    source = Path(dense)
    writer = BundleWriter(link=link, progress=progress)
    sources = [source] if source.is_dir() else []
    with (
        new_folder(Path(out), sources=sources) as folder,
        show_stages(progress, _NUM_STAGES) as stage,
    ):
        llm = folder / layout.LLM_FOLDER
        llm.mkdir()
        with stage("reading the decoder"):
            decoder = (
                _from_bundle(source) if source.is_dir() else _from_onnx(source, llm, writer)
            )
            trained = decoder.predictors
            if predictors is not None:
                trained = _from_checkpoint(predictors, llm, writer)
        geometry = decoder.manifest.geometry
        sparsity = complete_sparsity(
            options or SparsityOptions(),
            trained.config if trained is not None else None,
            num_layers=geometry.num_layers,
            num_image_tokens=geometry.num_image_tokens,
            source=f"{source} is a decoder",
            remedy="Name a trained Dynamic-LLaVA checkpoint with --predictors",
        )
        if trained is not None:
            _check_width(trained, predictors, source, geometry.hidden_size)
        explained = contextlib.nullcontext() if source.is_dir() else damage_explained(source)
        with stage("sparsifying"), explained:
            weights = trained.weights() if trained is not None else None
            models, passes = transform_decoder(decoder.model, sparsity, weights)
            _check_inputs(source, models[layout.DECODER])
        with stage("writing"):
            models[layout.DENSE_DECODER] = decoder.model
            if trained is not None:
                models[layout.PREDICTORS] = trained.model
                geometry = dataclasses.replace(geometry, predictor=_sizes(trained.config))
            save_models(llm, models)
            if source.is_dir():
                _carry_over(source, folder, models, decoder.manifest, writer)
        manifest = dataclasses.replace(
            decoder.manifest,
            geometry=geometry,
            sparsity=sparsity,
            tensors={
                **decoder.manifest.tensors,
                **describe_tensors(layout.LLM_FOLDER, models),
            },
            passes=passes,
            producer=tool_versions(),
            source=str(source),
        )
        with resources.stage("digests and manifest"):
            write_manifest(folder, manifest, writer.digest_of)
        written = writer.bytes_written(folder)
    seconds = time.perf_counter() - start
    return ExportReport.of(Path(out), manifest, writer, written, seconds, decoder.warnings)


def _from_bundle(folder: Path) -> _DenseDecoder:
    import onnx

    manifest = read_manifest(folder)
    check_graphs(folder, manifest)
    llm = folder / layout.LLM_FOLDER
    for name in (layout.DENSE_DECODER, layout.DECODER):
        if not (llm / name).is_file():
            raise BundleError(
                f"{folder} lacks {layout.LLM_FOLDER}/{name}, which sparsification starts from. "
                "Export the bundle again."
            )
    model = onnx.load(llm / layout.DENSE_DECODER, load_external_data=False)
    predictors = None
    if (llm / layout.PREDICTORS).is_file():
        weights = onnx.load(llm / layout.PREDICTORS, load_external_data=False)
        predictors = _Predictors(_training_of(manifest, llm, weights), weights)
    return _DenseDecoder(model, manifest, predictors)


def _training_of(manifest: Manifest, llm: Path, weights: onnx.ModelProto) -> PredictorConfig:
    """Return how a bundle's predictors were trained: from its config.json, else its manifest."""
    config_file = llm / "config.json"
    config = None
    if config_file.is_file():
        config = predictor_config(
            read_json(config_file, "the decoder of a bundle", BundleError, kinds=DECODER_KINDS)
        )
    sizes = manifest.geometry.predictor
    if config is not None and _sizes(config) == sizes:
        return config
    known: dict[str, Any] = dataclasses.asdict(sizes) if sizes is not None else {}
    stored = [tensor.name.split(".", 1)[0] for tensor in weights.graph.initializer]
    known["use_vision_predictor"] = "image_predictor" in stored
    known["has_output_text"] = "output_text_predictor" in stored
    sparsity = manifest.sparsity
    if _is_trained(sparsity.policy):
        known["sparse_layer"] = sparsity.sparse_layer
        known["vision_keep_rate"] = sparsity.image_keep_rate
    if _is_trained(sparsity.text_policy):
        known["output_text_keep_rate"] = sparsity.output_text_keep_rate
    return PredictorConfig(**known)


def _is_trained(policy: str) -> bool:
    """True for a policy whose settings say how the predictors it needs were trained."""
    found = POLICIES.find(policy)
    return found is not None and found.needs_predictors


def _from_checkpoint(location: str | Path, llm: Path, writer: BundleWriter) -> _Predictors:
    """Copy a checkpoint's predictors into `llm`; nothing else of it is used."""
    from dllava_export.checkpoints.checkpoint import read_checkpoint
    from dllava_export.exporting.weights import attach_weights

    checkpoint = read_checkpoint(location)
    model = predictor_model(checkpoint)
    if model is None or checkpoint.spec.predictors is None:
        raise UnsupportedModelError(
            f"{checkpoint.path} is a {checkpoint.spec.layout} checkpoint without predictors. "
            "Name a trained Dynamic-LLaVA checkpoint, or use a policy that needs no training: "
            f"{untrained_choices()}."
        )
    models = {layout.PREDICTORS: model}
    attach_weights(
        models,
        llm,
        checkpoint.tensors,
        data_name=_PREDICTOR_DATA,
        share=False,  # that would carry the whole checkpoint along
        writer=writer,
    )
    return _Predictors(checkpoint.spec.predictors, model)


def _check_width(
    trained: _Predictors, location: str | Path | None, source: Path, hidden_size: int
) -> None:
    width = trained.hidden_size()
    if width != hidden_size:
        raise UnsupportedModelError(
            f"The predictors of {location or source} read hidden states of width {width}, the "
            f"decoder {source} has hidden size {hidden_size}. Name the checkpoint that was "
            "trained with this decoder."
        )


def _sizes(config: PredictorConfig) -> PredictorGeometry:
    return PredictorGeometry(
        config.d_model, config.nhead, config.dim_feedforward, config.num_layers
    )


def _carry_over(
    source: Path,
    folder: Path,
    models: dict[str, onnx.ModelProto],
    manifest: Manifest,
    writer: BundleWriter,
) -> None:
    """Bring the weights that the new graphs use, copy tokenizer, configuration and visual."""
    import onnx

    llm = source / layout.LLM_FOLDER
    needed = referenced_files(models.values())
    if manifest.embedding is not None:
        needed.add(manifest.embedding["file"])
    graphs = [onnx.load(p, load_external_data=False) for p in llm.glob("*.onnx")]
    unneeded = referenced_files(graphs) - needed
    for path in sorted(llm.iterdir()):
        target = folder / layout.LLM_FOLDER / path.name
        if path.suffix == ".onnx" or path.name in unneeded or target.exists():
            continue
        _bring(path, target, writer if path.name in needed else None)
    if manifest.has_visual:
        visual = source / layout.VISUAL_FOLDER
        model = onnx.load(visual / layout.VISUAL, load_external_data=False)
        weights = referenced_files([model])
        (folder / layout.VISUAL_FOLDER).mkdir()
        for path in sorted(visual.iterdir()):
            target = folder / layout.VISUAL_FOLDER / path.name
            _bring(path, target, writer if path.name in weights else None)


def _bring(path: Path, target: Path, writer: BundleWriter | None) -> None:
    """Bring weights as the writer does; copy what somebody may edit in one bundle only."""
    if writer is not None:
        writer.bring(path, target)
    elif path.is_file():
        shutil.copyfile(path, target)


def _from_onnx(path: Path, llm: Path, writer: BundleWriter) -> _DenseDecoder:
    from dllava_export.passes.base import run_passes
    from dllava_export.passes.graph_io import graph_from_model
    from dllava_export.pipeline import normalising_passes

    decoder = read_decoder(path, llm, writer)
    config, warnings = _copy_config(path, llm)
    with damage_explained(path):
        graph = graph_from_model(decoder.model)
        run_passes(graph, normalising_passes())
        precision = _precision(path, graph)
        geometry = _geometry(path, graph)
    manifest = Manifest(
        family=None,
        layout="onnx",
        precision=precision,
        geometry=geometry,
        max_position_embeddings=config.get("max_position_embeddings")
        or _DEFAULT_MAX_POSITIONS,
        sparsity=DENSE,
        image_token_id=names.IMAGE_PLACEHOLDER_ID,
        image_aspect_ratio="square",
        has_visual=False,
        embedding=decoder.embedding,
        chat_template=None,
        eos_token_ids=_token_ids(config.get("eos_token_id")),
        tensors={},
        passes={},
        producer={},
        source=str(path),
    )
    return _DenseDecoder(decoder.model, manifest, None, warnings)


def _copy_config(path: Path, llm: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Copy configuration files beside a decoder; return (values, warnings)."""
    config: dict[str, Any] = {}
    for name in _CONFIG_FILES:
        file = path.parent / name
        if file.is_file():
            values = read_json(file, "the folder of a decoder", kinds=DECODER_KINDS)
            config |= (values.get("text_config") or {}) | values
            shutil.copyfile(file, llm / name)
    if config.get("max_position_embeddings") is not None:
        return config, ()
    warning = (
        f"{path.parent} has no config.json with max_position_embeddings: a context of "
        f"{_DEFAULT_MAX_POSITIONS} tokens is assumed."
    )
    return config, (warning,)


def _token_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, list):
        return tuple(int(item) for item in value)
    return (value,) if isinstance(value, int) else ()


def _precision(path: Path, graph: gs.Graph) -> Precision:
    """Return the precision of embeddings, keys and values, which must be one."""
    import numpy as np

    from dllava_export.passes.decoder_layers import find_decoder_layers
    from dllava_export.passes.graph_builder import find_input

    embeds = find_input(graph, names.INPUTS_EMBEDS)
    keys = [layer.attention.inputs[1] for layer in find_decoder_layers(graph)]
    found = sorted({np.dtype(tensor.dtype).name for tensor in (embeds, *keys)})
    known = format_of_dtype(found[0])
    if len(found) > 1 or known is None:
        expected = ", ".join(f.dtype_name for f in NUMBER_FORMATS.values())
        raise UnsupportedModelError(
            f"{path} has embeddings and keys of {' and '.join(found)}, expected all of one of "
            f"{expected}. Export it in one precision."
        )
    return Precision.of(known.name)


def _geometry(path: Path, graph: gs.Graph) -> Geometry:
    """Read the sizes of a normalised decoder off its graph."""
    from dllava_export.passes.decoder_layers import find_decoder_layers

    layers = find_decoder_layers(graph)
    attention = layers[0].attention
    num_kv_heads = int(attention.attrs["kv_num_heads"])
    sizes = {
        "hidden_size": layers[0].hidden_out.shape[-1],
        "intermediate_size": _mlp_width(layers[0]),
        "kv_width": attention.inputs[1].shape[-1],
        "vocab_size": graph.outputs[0].shape[-1],
    }
    unknown = [name for name, size in sizes.items() if not isinstance(size, int)]
    if unknown:
        raise UnsupportedModelError(
            f"{path}: {', '.join(unknown)} cannot be read off the graph; expected fixed sizes "
            f"besides batch and rows, found {sizes}. Export it with those dimensions fixed."
        )
    kv_width = sizes.pop("kv_width")
    return Geometry(
        num_layers=len(layers),
        num_heads=int(attention.attrs["q_num_heads"]),
        num_kv_heads=num_kv_heads,
        head_dim=kv_width // num_kv_heads,
        num_image_tokens=0,
        **sizes,
    )


def _mlp_width(layer: DecoderLayer) -> int | str | None:
    """Return the width that the down projection reads, whose output closes a layer."""
    from dllava_export.passes.patterns import producer_of

    residual_sum = producer_of(layer.hidden_out, "Add")
    for tensor in residual_sum.inputs if residual_sum is not None else ():
        if tensor is layer.hidden_mid:
            continue
        bias = producer_of(tensor, "Add")
        for candidate in (tensor, *(bias.inputs if bias is not None else ())):
            projection = producer_of(candidate, "MatMul", "Gemm")
            if projection is not None:
                return projection.inputs[0].shape[-1]
    return None


def _check_inputs(source: Path, decoder: onnx.ModelProto) -> None:
    """Refuse a decoder that asks for something the runtime does not feed."""
    known = {
        *_LEFT_INPUTS,
        names.NUM_KEPT,
        names.KEPT_LENGTHS,
        names.NUM_IMAGE_ROWS,
        names.write_index(names.FULL),
        names.write_index(names.SPARSE),
    }
    prefix = names.past(0, "key").split(".", 1)[0]
    left = [
        value.name
        for value in decoder.graph.input
        if value.name not in known and not value.name.startswith(f"{prefix}.")
    ]
    if left:
        raise UnsupportedModelError(
            f"{source} still reads {left} after sparsification, not only for the causal mask; "
            f"expected {', '.join(_LEFT_INPUTS)}. Export the language model alone, with "
            "position ids as an input."
        )
