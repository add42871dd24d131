"""What the graphs of a bundle take in memory, for one sample."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.graph_memory import (
    buffer_bytes,
    peak_activation_bytes,
    weight_bytes,
)
from dllava_export.bundles.manifest import Manifest
from dllava_export.checkpoints.tensor_source import DTYPE_NAMES
from dllava_export.errors import BundleError

if TYPE_CHECKING:
    import onnx

    from dllava_export.backends.kv_plan import KVPlan


__all__ = ["BundleGraphs", "GraphSizes", "Rows", "graph_sizes", "read_graphs"]


@dataclasses.dataclass(frozen=True)
class BundleGraphs:
    """The structure of a bundle's graphs; weights stay on disk.

    Attributes:
        decoder: The decoder with KV cache.
        visual: Tower and projector; None in a bundle of a bare decoder.
        predictor_names: Initializers of the decoder that belong to trained predictors.
        num_layers: Decoder layers.
        embedding_bytes: Bytes of the token embeddings.
    """

    decoder: onnx.ModelProto
    visual: onnx.ModelProto | None
    predictor_names: frozenset[str]
    num_layers: int
    embedding_bytes: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one sample in the prefill.

    Attributes:
        prompt: All.
        kept: Those that go on from `sparse_layer`.
        image: Those that the image predictor scores; 0 where nothing is scored.
    """

    prompt: int
    kept: int
    image: int


@dataclasses.dataclass(frozen=True)
class GraphSizes:
    """Bytes; activations and buffers are those of one sample's prefill.

    Attributes:
        decoder_weights: The decoder's, without predictors.
        predictor_weights: In float32, as they compute: runtimes convert them once.
        visual_weights: Tower and projector.
        decoder_activations: See `peak_activation_bytes`.
        visual_activations: The same, of one image.
        buffers: Inputs and outputs of both graphs, caches not counted.
    """

    decoder_weights: int
    predictor_weights: int
    visual_weights: int
    decoder_activations: int
    visual_activations: int
    buffers: int


def read_graphs(folder: Path, manifest: Manifest) -> BundleGraphs:
    """Read the graphs of a bundle.

    Raises:
        BundleError: If a file is missing or is no ONNX model.
    """
    llm = folder / layout.LLM_FOLDER
    predictors: frozenset[str] = frozenset()
    if (llm / layout.PREDICTORS).is_file():
        initializers = _read(llm / layout.PREDICTORS).graph.initializer
        predictors = frozenset(tensor.name for tensor in initializers)
    visual = None
    if manifest.has_visual:
        visual = _read(folder / layout.VISUAL_FOLDER / layout.VISUAL)
    return BundleGraphs(
        decoder=_read(llm / layout.DECODER),
        visual=visual,
        predictor_names=predictors,
        num_layers=manifest.geometry.num_layers,
        embedding_bytes=_table_bytes(manifest.embedding),
    )


def graph_sizes(graphs: BundleGraphs, plan: KVPlan, rows: Rows) -> GraphSizes:
    """Measure graphs with the caches of `plan`.

    Raises:
        UnsupportedModelError: If shapes are not known.
    """
    dimensions = {
        names.BATCH: 1,
        names.ROWS: rows.prompt,
        names.NUM_KEPT_DIM: rows.kept,
        names.NUM_IMAGE_ROWS: rows.image,
        **{names.capacity(group): rows for group, rows in plan.capacities.items()},
    }
    weights = graphs.decoder.graph.initializer
    own = [tensor for tensor in weights if tensor.name not in graphs.predictor_names]
    predictors = [tensor for tensor in weights if tensor.name in graphs.predictor_names]
    caches = {
        name(layer, part)
        for name in (names.past, names.present)
        for layer in range(graphs.num_layers)
        for part in ("key", "value")
    }
    ends = [*graphs.decoder.graph.input, *graphs.decoder.graph.output]
    buffers = buffer_bytes([end for end in ends if end.name not in caches], dimensions)
    visual_weights = visual_activations = 0
    if graphs.visual is not None:
        visual_weights = weight_bytes(graphs.visual.graph.initializer)
        visual_activations = peak_activation_bytes(graphs.visual, dimensions)
        ends = [*graphs.visual.graph.input, *graphs.visual.graph.output]
        buffers += buffer_bytes(ends, dimensions)
    return GraphSizes(
        decoder_weights=weight_bytes(own),
        predictor_weights=weight_bytes(predictors, itemsize=4),
        visual_weights=visual_weights,
        decoder_activations=peak_activation_bytes(graphs.decoder, dimensions),
        visual_activations=visual_activations,
        buffers=buffers,
    )


def _read(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(
            f"{path} cannot be read as an ONNX model ({error}). Export the bundle again."
        ) from error


def _table_bytes(reference: dict[str, Any] | None) -> int:
    if reference is None:
        return 0
    return math.prod(reference["shape"]) * DTYPE_NAMES[reference["dtype"]].itemsize
