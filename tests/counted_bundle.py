"""A bundle whose every byte can be counted by hand: two layers of one product each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import Manifest, write_manifest
from dllava_export.geometry import Geometry
from dllava_export.precision import Precision
from dllava_export.sparsity import Sparsity

F16, INT64 = TensorProto.FLOAT16, TensorProto.INT64
NUM_IMAGE, NUM_KEPT_IMAGE, VOCAB, HIDDEN, WIDE = 6, 2, 50, 8, 32
GEOMETRY = Geometry(
    num_layers=2,
    hidden_size=HIDDEN,
    intermediate_size=WIDE,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=VOCAB,
    num_image_tokens=NUM_IMAGE,
)
SPARSITY = Sparsity(
    "predictor", 1, image_keep_tokens=NUM_KEPT_IMAGE, output_text_keep_rate=0.5
)


def value(name: str, shape: list, dtype: int = F16) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.zeros(shape, np.float16), name)


def decoder() -> onnx.ModelProto:
    """All rows through a wide layer, the image rows through a predictor, the rest through head."""
    caches = [
        (make, layer, part)
        for make in (names.past, names.present)
        for layer in (0, 1)
        for part in ("key", "value")
    ]
    ends = [
        value(make(layer, part), [names.BATCH, 1, capacity, 4])
        for make, layer, part in caches
        for capacity in [(names.capacity(names.FULL), names.capacity(names.SPARSE))[layer]]
    ]
    nodes = [
        helper.make_node("MatMul", [names.INPUTS_EMBEDS, "up"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["active"]),
        helper.make_node("Slice", ["active"], ["image"]),
        helper.make_node("MatMul", ["image", "scores"], ["scored"]),
        helper.make_node("GatherND", ["active", "scored"], ["kept"]),
        helper.make_node("MatMul", ["kept", "head"], [names.LOGITS]),
    ]
    rows = [names.BATCH, names.ROWS, WIDE]
    image = [names.BATCH, names.NUM_IMAGE_ROWS]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            value(names.INPUTS_EMBEDS, [names.BATCH, names.ROWS, HIDDEN]),
            value(names.POSITION_IDS, [names.BATCH, names.ROWS], INT64),
            *ends[:4],
        ],
        [value(names.LOGITS, [names.BATCH, VOCAB]), *ends[4:]],
        [weight("up", HIDDEN, WIDE), weight("scores", WIDE, 3), weight("head", WIDE, VOCAB)],
        value_info=[
            value("wide", rows),
            value("active", rows),
            value("image", [*image, WIDE]),
            value("scored", [*image, 3]),
            value("kept", [names.BATCH, names.NUM_KEPT_DIM, WIDE]),
        ],
    )
    return helper.make_model(graph)


def visual() -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [names.PIXEL_VALUES, "tower"], ["features"]),
            helper.make_node("Relu", ["features"], [names.IMAGE_FEATURES]),
        ],
        "visual",
        [value(names.PIXEL_VALUES, [names.BATCH, NUM_IMAGE, 5])],
        [value(names.IMAGE_FEATURES, [names.BATCH, NUM_IMAGE, HIDDEN])],
        [weight("tower", 5, HIDDEN)],
        value_info=[value("features", [names.BATCH, NUM_IMAGE, HIDDEN])],
    )
    return helper.make_model(graph)


def make_counted_bundle(folder: Path, **changes: object) -> Manifest:
    """Write the bundle; `changes` replace values of its manifest."""
    llm, tower = folder / layout.LLM_FOLDER, folder / layout.VISUAL_FOLDER
    llm.mkdir(parents=True)
    tower.mkdir()
    predictors = helper.make_graph([], "predictors", [], [], [weight("scores", WIDE, 3)])
    onnx.save(decoder(), llm / layout.DECODER)
    onnx.save(helper.make_model(predictors), llm / layout.PREDICTORS)
    onnx.save(visual(), tower / layout.VISUAL)
    values = {
        "family": "llava",
        "layout": "dynamic-llava",
        "precision": Precision.of("fp16"),
        "geometry": GEOMETRY,
        "max_position_embeddings": 4096,
        "sparsity": SPARSITY,
        "image_token_id": -200,
        "image_aspect_ratio": "pad",
        "has_visual": True,
        "embedding": {"file": "t", "offset": 0, "dtype": "F16", "shape": [VOCAB, HIDDEN]},
        "chat_template": None,
        "eos_token_ids": (2,),
        "tensors": {},
        "passes": {"model.onnx": []},
        "producer": {},
        "source": "nothing",
    }
    manifest = Manifest(**{**values, **changes})
    write_manifest(folder, manifest)
    return manifest
