from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checkpoint_factory import HIDDEN, SPARSE_CONFIG, make_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.embedding import EmbeddingTable
from dllava_export.bundles.manifest import read_manifest, write_manifest
from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.errors import (
    BundleError,
    CheckpointError,
    PreconditionError,
    UnsupportedModelError,
)
from dllava_export.exporting import tracing
from dllava_export.exporting.exporter import export_checkpoint
from dllava_export.exporting.options import SparsityOptions
from dllava_export.exporting.sparsifier import sparsify_decoder
from dllava_export.passes.policies.base import AttentionArrays, ImageArrays
from dllava_export.passes.policies.registry import POLICIES

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 2, 2, 16, 50
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": NUM_KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so that attention is not nearly uniform
    "use_cache": False,
}
# float32: two kernels that sum in another order; float16: 11 bits, two layers, logits up to 8.
TOLERANCES = {"fp32": 1e-4, "fp16": 4e-2}
ALL_KEPT = {"image_keep_rate": 1.0, "output_text_keep_rate": 1.0}

PAD, TEXT, IMAGE = names.PADDING, names.PROMPT_TEXT, names.IMAGE
TOKEN_KIND = np.array(
    [[TEXT] * 3 + [IMAGE] * 6 + [TEXT] * 3, [TEXT] * 1 + [IMAGE] * 6 + [TEXT] * 3 + [PAD] * 2]
)
BATCH, ROWS = TOKEN_KIND.shape
LENGTHS = np.array([12, 10])
IDS = np.random.default_rng(0).integers(0, VOCAB, TOKEN_KIND.shape)
POSITIONS = np.tile(np.arange(ROWS), (BATCH, 1))


def llama(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, attn_implementation=attention)
    return LlamaForCausalLM(config).to(dtype).eval()


class Decoder(torch.nn.Module):
    """The language model with the arguments of an export."""

    def __init__(self, model: LlamaForCausalLM, first: str = "input_ids") -> None:
        super().__init__()
        self.model, self.first = model, first

    def forward(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        given = {self.first: tokens}
        return self.model(
            **given, attention_mask=attention_mask, position_ids=position_ids
        ).logits


def example(first: str = "input_ids") -> tuple[torch.Tensor, ...]:
    tokens = torch.zeros(2, 7, dtype=torch.long)
    if first == "inputs_embeds":
        tokens = torch.zeros(2, 7, CONFIG["hidden_size"])
    return tokens, torch.ones(2, 7, dtype=torch.long), torch.arange(7).repeat(2, 1)


# Each exporter writes `folder`/model.onnx.


def with_transformers(folder: Path) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    keys = ("input_ids", "attention_mask", "position_ids")
    inputs = dict(zip(keys, example(), strict=True))
    OnnxExporter().export(llama(), inputs, config=OnnxConfig(dynamic=True)).save_pretrained(
        folder
    )


def with_torch(attention: str, dtype: torch.dtype, opset: int, folder: Path) -> None:
    dims = {0: torch.export.Dim("b"), 1: torch.export.Dim("n")}
    program = torch.onnx.export(
        Decoder(llama(attention, dtype)),
        example(),
        dynamo=True,
        opset_version=opset,
        input_names=["input_ids", "attention_mask", "position_ids"],
        dynamic_shapes={"tokens": dims, "attention_mask": dims, "position_ids": dims},
        verbose=False,
    )
    program.save(folder / "model.onnx", external_data=attention == "eager")


class Layers(torch.nn.Module):
    """The layers alone, causal by SDPA's own flag: a mask asks the query for its size."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        rotary = self.model.model.rotary_emb(inputs_embeds, position_ids)
        for layer in self.model.model.layers:
            inputs_embeds = layer(inputs_embeds, position_embeddings=rotary)
        return self.model.lm_head(self.model.model.norm(inputs_embeds))


def with_bare_layers(opset: int, folder: Path) -> None:
    tokens, _, position_ids = example("inputs_embeds")
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")}
    program = torch.onnx.export(
        Layers(),
        (tokens, position_ids),
        dynamo=True,
        opset_version=opset,
        input_names=["inputs_embeds", "position_ids"],
        dynamic_shapes={"inputs_embeds": dims, "position_ids": dims},
        verbose=False,
    )
    program.save(folder / "model.onnx", external_data=True)


def with_torchscript(
    attention: str,
    folder: Path,
    first: str = "input_ids",
    dtype: torch.dtype = torch.float32,
    dynamic: bool = True,
) -> None:
    inputs = [first, "attention_mask", "position_ids"]
    torch.onnx.export(
        Decoder(llama(attention, dtype), first),
        example(first),
        str(folder / "model.onnx"),
        dynamo=False,
        opset_version=18,
        input_names=inputs,
        output_names=["logits"],
        dynamic_axes={k: {0: "b", 1: "n"} for k in [*inputs, "logits"]} if dynamic else {},
    )


EXPORTERS: dict[str, Callable[[Path], None]] = {
    "transformers": with_transformers,
    "torch eager fp16 opset 18": lambda f: with_torch("eager", torch.float16, 18, f),
    "torch sdpa opset 23": lambda f: with_torch("sdpa", torch.float32, 23, f),
    "torchscript eager fp16": lambda f: with_torchscript("eager", f, dtype=torch.float16),
    "torchscript sdpa": lambda f: with_torchscript("sdpa", f),
    "torch layers opset 18": lambda f: with_bare_layers(18, f),
    "torch layers opset 20": lambda f: with_bare_layers(20, f),
    "torchscript embeds": lambda f: with_torchscript("sdpa", f, "inputs_embeds"),
}


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An exported decoder and a bundle made of it with every row kept."""

    path: Path
    sparse: Path

    @property
    def precision(self) -> str:
        return str(read_manifest(self.sparse, verify=False).precision)


@pytest.fixture(scope="session")
def foreign_decoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Foreign]:
    made: dict[str, Foreign] = {}

    def get(name: str) -> Foreign:
        if name not in made:
            folder = tmp_path_factory.mktemp("foreign")
            (folder / "dense").mkdir()
            with warnings.catch_warnings():  # exporters deprecate parts of each other
                warnings.simplefilter("ignore")
                EXPORTERS[name](folder / "dense")
            path = folder / "dense" / "model.onnx"
            options = SparsityOptions(policy="norm", sparse_layer=1, **ALL_KEPT)
            sparsify_decoder(path, folder / "sparse", options)
            made[name] = Foreign(path, folder / "sparse")
        return made[name]

    return get


@pytest.fixture(params=EXPORTERS)
def foreign(request: pytest.FixtureRequest, foreign_decoders: Callable) -> Foreign:
    return foreign_decoders(request.param)


@pytest.fixture
def decoder(foreign_decoders: Callable) -> Foreign:
    return foreign_decoders("torchscript sdpa")


def run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, session.run(None, given), strict=True))


def embeddings(dtype: type = np.float32) -> np.ndarray:
    return llama().model.embed_tokens.weight.detach().numpy()[IDS].astype(dtype)


def dense_logits(foreign: Foreign) -> np.ndarray:
    feeds = {
        "input_ids": IDS,
        "inputs_embeds": embeddings(),
        "attention_mask": np.ones_like(IDS),
        "position_ids": POSITIONS,
    }
    logits = next(iter(run(foreign.path, feeds).values()))
    return logits[np.arange(BATCH), LENGTHS - 1]


def run_bundle(folder: Path, graph: str, num_dropped: int = 0) -> dict[str, np.ndarray]:
    """Prefill; the caches, where there are some, have room to spare."""
    manifest = read_manifest(folder)
    dtype = manifest.precision.weights.numpy
    if manifest.embedding is None:
        embedded = embeddings(dtype)
    else:
        embedded = EmbeddingTable(folder / "llm", manifest.embedding).lookup(IDS)
        np.testing.assert_array_equal(embedded, embeddings(dtype))
    kept_lengths = LENGTHS - num_dropped
    feeds = {
        names.INPUTS_EMBEDS: embedded,
        names.POSITION_IDS: POSITIONS,
        names.TOKEN_KIND: TOKEN_KIND,
        names.NUM_KEPT: kept_lengths.max(keepdims=True),
        names.KEPT_LENGTHS: kept_lengths,
        names.write_index(names.FULL): np.zeros(BATCH, np.int64),
        names.write_index(names.SPARSE): np.zeros(BATCH, np.int64),
    }
    for layer in range(NUM_LAYERS):
        for part in ("key", "value"):
            cache = np.zeros((BATCH, NUM_KV_HEADS, ROWS + 3, HEAD_DIM), dtype)
            feeds[names.past(layer, part)] = cache
    return run(folder / "llm" / graph, feeds)


@torch.no_grad()
def reference(
    num_dropped: int, sparse_layer: int = 1, policy: str = "norm"
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return kept rows and logits per sample, from transformers' layers."""
    model = llama().model
    head = llama().lm_head
    kept_rows, logits = [], []
    for sample, length in enumerate(LENGTHS):
        positions = torch.from_numpy(POSITIONS[sample : sample + 1, :length])
        hidden = model.embed_tokens(torch.from_numpy(IDS[sample : sample + 1, :length]))
        rotary = model.rotary_emb(hidden, positions)
        for layer in model.layers[:sparse_layer]:
            attention = attended(layer, hidden, rotary, TOKEN_KIND[sample, :length])
            hidden = layer(hidden, position_embeddings=rotary)
        image = np.flatnonzero(TOKEN_KIND[sample] == IMAGE)
        rows = ImageArrays(
            hidden_states=hidden[0, image].numpy(),
            position_ids=image,
            num_kept=len(image) - num_dropped,
            attention=attention,
        )
        scores = POLICIES.get(policy).reference(rows, None)
        dropped = image[np.argsort(-scores, kind="stable")[len(image) - num_dropped :]]
        kept = np.setdiff1d(np.arange(length), dropped)
        hidden, positions = hidden[:, kept], positions[:, kept]
        rotary = model.rotary_emb(hidden, positions)
        for layer in model.layers[sparse_layer:]:
            hidden = layer(hidden, position_embeddings=rotary)
        kept_rows.append(kept)
        logits.append(head(model.norm(hidden))[0, -1].numpy())
    return kept_rows, np.stack(logits)


def attended(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    kinds: np.ndarray,
) -> AttentionArrays:
    """Return what a layer attends with, from its own projections."""
    normed = layer.input_layernorm(hidden)
    attention = layer.self_attn
    query, key = (
        projection(normed).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    return AttentionArrays(
        query=query[0].transpose(0, 1).numpy(),
        key=key[0].transpose(0, 1).numpy(),
        scale=attention.scaling,
        token_kind=kinds,
    )


GRAPHS = [layout.DECODER, layout.RECOMPUTE]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("policy", ["norm", "uniform", "random", "none"])
def test_equals_the_foreign_decoder_where_all_is_kept(
    foreign: Foreign, policy: str, graph: str, tmp_path: Path
) -> None:
    folder = foreign.sparse
    if policy != "norm":
        rates = {} if policy == "none" else ALL_KEPT | {"sparse_layer": 1}
        folder = tmp_path / "again"
        sparsify_decoder(foreign.sparse, folder, SparsityOptions(policy=policy, **rates))
    tolerance = TOLERANCES[foreign.precision]
    logits = run_bundle(folder, graph)[names.LOGITS]
    np.testing.assert_allclose(logits, dense_logits(foreign), tolerance, tolerance)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("policy", ["norm", "attention", "key-diff"])
def test_keeps_the_rows_of_the_reference(
    foreign: Foreign, policy: str, graph: str, tmp_path: Path
) -> None:
    options = SparsityOptions(policy=policy, sparse_layer=1, image_keep_rate=0.5)
    sparsify_decoder(foreign.sparse, tmp_path / "half", options)
    found = run_bundle(tmp_path / "half", graph, num_dropped=3)
    kept, logits = reference(3, policy=policy)
    for sample, rows in enumerate(kept):
        assert found[names.KEPT_INDICES][sample, : len(rows)].tolist() == rows.tolist()
    tolerance = TOLERANCES[foreign.precision]
    np.testing.assert_allclose(found[names.LOGITS], logits, tolerance, tolerance)


def test_stores_weights_once(foreign: Foreign) -> None:
    num_bytes = sum(p.numel() for p in llama().parameters()) * (
        2 if foreign.precision == "fp16" else 4
    )
    sizes = {p.name: p.stat().st_size for p in (foreign.sparse / "llm").iterdir()}
    graphs = [size for name, size in sizes.items() if name.endswith(".onnx")]
    data = sum(size for name, size in sizes.items() if not name.endswith((".onnx", ".json")))
    assert len(graphs) == 3
    assert max(graphs) < 100_000
    assert (
        0.98 * num_bytes - 13_000 < data < 1.02 * num_bytes
    )  # less where it lacks embeddings


def test_reads_the_geometry_off_the_graph(foreign: Foreign) -> None:
    manifest = read_manifest(foreign.sparse)
    geometry = dataclasses.asdict(manifest.geometry)
    expected = {
        "num_layers": NUM_LAYERS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "num_image_tokens": 0,
    }
    assert geometry.items() >= expected.items()
    assert (manifest.layout, manifest.has_visual, manifest.chat_template) == (
        "onnx",
        False,
        None,
    )


def test_reads_limits_and_ends_from_a_configuration_beside_the_decoder(
    decoder: Foreign, tmp_path: Path
) -> None:
    shutil.copytree(decoder.path.parent, tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(
        json.dumps({"max_position_embeddings": 77, "eos_token_id": [3, 4]})
    )
    path = tmp_path / "dense" / "model.onnx"
    report = sparsify_decoder(
        path, tmp_path / "out", SparsityOptions(policy="uniform", sparse_layer=1)
    )
    assert report.warnings == ()
    assert report.manifest.max_position_embeddings == 77
    assert report.manifest.eos_token_ids == (3, 4)
    assert "0.2 of the image tokens" in report.to_text()


def test_warns_where_the_context_length_is_not_known(decoder: Foreign, tmp_path: Path) -> None:
    report = sparsify_decoder(decoder.path, tmp_path / "out", SparsityOptions(policy="none"))
    assert "a context of 2048 tokens is assumed" in report.warnings[0]


def test_shows_progress(
    decoder: Foreign, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparsify_decoder(
        decoder.path, tmp_path / "out", SparsityOptions(policy="none"), progress=True
    )
    assert "sparsifying" in capsys.readouterr().err


# Our own bundles.


@dataclasses.dataclass(frozen=True)
class Own:
    """A checkpoint with predictors, exported dense and as trained."""

    checkpoint: Path
    dense: Path
    sparse: Path


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    folder = tmp_path_factory.mktemp("own")
    paths = Own(folder / "checkpoint", folder / "dense", folder / "sparse")
    # Wide enough for weights that are not kept inside the graphs.
    make_checkpoint(
        paths.checkpoint, changes={"sparse_config": SPARSE_CONFIG | {"d_model": 32}}
    )
    checkpoint = read_checkpoint(paths.checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("trace_decoder", "trace_visual"):  # what takes time, and does not differ
            patch.setattr(tracing, name, traced_once(getattr(tracing, name)))
        # Copied weights: with links, offsets would agree by themselves.
        export_checkpoint(checkpoint, paths.dense, SparsityOptions(policy="none"), link=False)
        export_checkpoint(checkpoint, paths.sparse, link=False)
    return paths


def traced_once(trace: Callable[..., onnx.ModelProto]) -> Callable[..., onnx.ModelProto]:
    made: list[onnx.ModelProto] = []

    def copy_of_trace(*args: Any) -> onnx.ModelProto:
        made.extend([] if made else [trace(*args)])
        return copy.deepcopy(made[0])

    return copy_of_trace


def files(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in paths
        if p.name not in ("dllava_export.json", *but)
    }


def test_sparsifying_a_dense_bundle_equals_a_direct_export(own: Own, tmp_path: Path) -> None:
    sparsify_decoder(own.dense, tmp_path / "out")
    assert files(tmp_path / "out") == files(own.sparse)
    expected = read_manifest(own.sparse)
    found = read_manifest(tmp_path / "out")
    assert found == dataclasses.replace(expected, source=str(own.dense))


def test_sparsifying_a_sparse_bundle_starts_from_its_dense_decoder(
    own: Own, tmp_path: Path
) -> None:
    options = SparsityOptions(image_keep_tokens=1, sparse_layer=2)
    sparsify_decoder(own.dense, tmp_path / "from dense", options)
    sparsify_decoder(own.sparse, tmp_path / "from sparse", options)
    assert files(tmp_path / "from dense") == files(tmp_path / "from sparse")
    sparsify_decoder(own.sparse, tmp_path / "dense", SparsityOptions(policy="none"))
    assert files(tmp_path / "dense") == files(own.dense)


def test_weights_and_configuration_are_copied(own: Own, tmp_path: Path) -> None:
    report = sparsify_decoder(own.dense, tmp_path / "out")
    for name in files(tmp_path / "out"):
        assert (tmp_path / "out" / name).stat().st_nlink == 1
    assert (report.bytes_linked, report.bytes_cloned) == (0, 0)
    for path in (tmp_path / "out").glob("*/*.onnx"):
        onnx.load(path)


def test_weights_are_linked_where_links_are_asked_for(own: Own, tmp_path: Path) -> None:
    report = sparsify_decoder(own.dense, tmp_path / "out", link=True)
    weights, config = "llm/model.onnx.data", "llm/config.json"
    assert (tmp_path / "out" / weights).samefile(own.dense / weights)
    assert not (tmp_path / "out" / config).samefile(own.dense / config)
    assert report.bytes_linked > (own.dense / weights).stat().st_size
    assert "warning: weights are hard links" in report.to_text()


def test_training_settings_come_from_the_manifest_without_a_configuration(
    own: Own, tmp_path: Path
) -> None:
    shutil.copytree(own.sparse, tmp_path / "bundle")
    (tmp_path / "bundle" / "llm" / "config.json").unlink()
    write_manifest(tmp_path / "bundle", read_manifest(own.sparse))
    report = sparsify_decoder(tmp_path / "bundle", tmp_path / "out")
    assert report.manifest.sparsity == read_manifest(own.sparse).sparsity


def without_predictors(own: Own, folder: Path) -> Path:
    shutil.copytree(own.dense, folder)
    manifest = read_manifest(folder)
    (folder / "llm" / layout.PREDICTORS).unlink()
    geometry = dataclasses.replace(manifest.geometry, predictor=None)
    write_manifest(folder, dataclasses.replace(manifest, geometry=geometry))
    return folder


def test_predictors_can_come_from_a_checkpoint(own: Own, tmp_path: Path) -> None:
    source = without_predictors(own, tmp_path / "plain")
    report = sparsify_decoder(source, tmp_path / "out", predictors=own.checkpoint)
    expected = read_manifest(own.sparse)
    assert report.manifest.sparsity == expected.sparsity
    assert report.manifest.geometry == expected.geometry
    # And from then on, from the bundle.
    sparsify_decoder(tmp_path / "out", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "out")
    assert "predictors.onnx.data" in {p.name for p in (tmp_path / "again/llm").iterdir()}


def test_predictors_of_a_checkpoint_replace_those_of_a_bundle(
    own: Own, tmp_path: Path
) -> None:
    config = json.loads((own.checkpoint / "config.json").read_text())
    other = config["sparse_config"] | {"d_model": 12, "sparse_layer": 2}
    make_checkpoint(tmp_path / "other", changes={"sparse_config": other})
    report = sparsify_decoder(own.sparse, tmp_path / "out", predictors=tmp_path / "other")
    assert report.manifest.geometry.predictor.d_model == 12
    assert report.manifest.sparsity.sparse_layer == 2
    again = sparsify_decoder(tmp_path / "out", tmp_path / "again")
    assert again.manifest.geometry == report.manifest.geometry


# What cannot be used.


def fails(
    error: type[Exception],
    message: str,
    source: Path,
    tmp_path: Path,
    options: SparsityOptions | None = None,
    **kwargs: Any,
) -> None:
    out = tmp_path / "never"
    with pytest.raises(error, match=message):
        sparsify_decoder(source, out, options or SparsityOptions(policy="norm"), **kwargs)
    assert not [p for p in tmp_path.iterdir() if "never" in p.name]


def edited(source: Foreign, tmp_path: Path, edit: Callable[[onnx.ModelProto], Any]) -> Path:
    model = onnx.load(source.path)
    edit(model)
    path = tmp_path / "edited.onnx"
    onnx.save(model, path)
    return path


def test_refuses_what_does_not_exist(tmp_path: Path) -> None:
    fails(
        BundleError, "does not exist; expected a bundle folder", tmp_path / "x.onnx", tmp_path
    )


def test_refuses_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(BundleError, "has no dllava_export.json", tmp_path / "empty", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0b\x12"])
def test_refuses_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    fails(BundleError, "expected an ONNX model|is not an ONNX", tmp_path / "x.onnx", tmp_path)


def test_refuses_a_truncated_model(decoder: Foreign, tmp_path: Path) -> None:
    data = decoder.path.read_bytes()
    (tmp_path / "x.onnx").write_bytes(data[: len(data) // 2])
    fails(BundleError, "not an ONNX file, or it is truncated", tmp_path / "x.onnx", tmp_path)


@pytest.mark.parametrize(
    ("size", "message"), [(None, "is missing"), (1000, "has 1000 bytes, expected the weights")]
)
def test_refuses_missing_external_data(
    foreign_decoders: Callable, size: int | None, message: str, tmp_path: Path
) -> None:
    source = foreign_decoders("transformers").path
    shutil.copyfile(source, tmp_path / "model.onnx")
    if size is not None:
        (tmp_path / "model.onnx.data").write_bytes(bytes(size))
    fails(BundleError, message, tmp_path / "model.onnx", tmp_path)


def test_refuses_external_data_outside_the_folder(
    foreign_decoders: Callable, tmp_path: Path
) -> None:
    model = onnx.load(foreign_decoders("transformers").path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    fails(BundleError, "expected a file beside the model", tmp_path / "x.onnx", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        pytest.param("offset", "-1", "the offset '-1', expected a number", id="negative"),
        pytest.param("offset", "x", "the offset 'x', expected a number", id="no number"),
        pytest.param("length", "8", "8 bytes, its shape .* takes", id="another length"),
        pytest.param("offset", "99999999", "expected the weights of", id="behind the end"),
        pytest.param("location", "/etc/passwd", "expected a file beside", id="absolute"),
        pytest.param("location", "", "expected a file beside", id="empty"),
        pytest.param("location", ".", "expected a file beside", id="the folder"),
    ],
)
def test_refuses_bad_places_of_external_data(
    foreign_decoders: Callable, tmp_path: Path, key: str, value: str, message: str
) -> None:
    source = foreign_decoders("transformers").path
    shutil.copytree(source.parent, tmp_path / "dense")
    path = tmp_path / "dense" / source.name
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    (entry,) = (e for e in tensor.external_data if e.key == key)
    entry.value = value
    path.write_bytes(model.SerializeToString())
    fails(BundleError, message, path, tmp_path)


# Folders as people have them.


def stored_as(decoder: Foreign, folder: Path, **options: Any) -> Path:
    """Store a decoder's weights outside, and return the path of its graph."""
    folder.mkdir()
    model = onnx.load(decoder.path)
    options = {"size_threshold": 0, "location": "weights.bin", **options}
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, **options)
    return folder / "model.onnx"


def same_answers(path: Path, decoder: Foreign, out: Path, **options: Any) -> None:
    settings = SparsityOptions(policy="norm", sparse_layer=1, **ALL_KEPT)
    sparsify_decoder(path, out, settings, **options)
    for graph in (layout.DECODER, layout.RECOMPUTE):
        expected = run_bundle(decoder.sparse, graph)["logits"]
        np.testing.assert_array_equal(run_bundle(out, graph)["logits"], expected)
        onnx.load(out / "llm" / graph)


@pytest.mark.parametrize("threshold", [0, 256, 1024])
def test_reads_small_tensors_outside(decoder: Foreign, tmp_path: Path, threshold: int) -> None:
    path = stored_as(decoder, tmp_path / "in", size_threshold=threshold)
    same_answers(path, decoder, tmp_path / "out")


def test_reads_one_data_file_per_tensor(decoder: Foreign, tmp_path: Path) -> None:
    path = stored_as(decoder, tmp_path / "in", all_tensors_to_one_file=False, location=None)
    assert len(list(path.parent.iterdir())) > 10
    same_answers(path, decoder, tmp_path / "out")


@pytest.mark.parametrize("link", [False, True])
def test_a_data_file_of_the_user_gets_no_link(
    decoder: Foreign, tmp_path: Path, link: bool
) -> None:
    path = stored_as(decoder, tmp_path / "in")
    same_answers(path, decoder, tmp_path / "out", link=link)
    assert (path.parent / "weights.bin").stat().st_nlink == 1
    onnx.load(path)


def test_reads_a_data_file_that_has_several_links(decoder: Foreign, tmp_path: Path) -> None:
    path = stored_as(decoder, tmp_path / "in")
    (tmp_path / "another").hardlink_to(path.parent / "weights.bin")
    same_answers(path, decoder, tmp_path / "out")


@pytest.fixture
def hub_cache(tmp_path: Path) -> Callable[[Path], Path]:
    """Return what puts a folder's files into a hub cache and returns the snapshot."""

    def cached(folder: Path) -> Path:
        snapshot, blobs = tmp_path / "cache/snapshots/1", tmp_path / "cache/blobs"
        blobs.mkdir(parents=True)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        for number, path in enumerate(paths):
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blobs / f"blob{number}")
            link.symlink_to(blobs / f"blob{number}")
        return snapshot

    return cached


def test_reads_a_decoder_in_a_hub_cache(
    decoder: Foreign, hub_cache: Callable, tmp_path: Path
) -> None:
    path = stored_as(decoder, tmp_path / "in")
    same_answers(hub_cache(path.parent) / path.name, decoder, tmp_path / "out")


def test_reads_a_graph_that_is_linked_to_from_elsewhere(
    decoder: Foreign, tmp_path: Path
) -> None:
    path = stored_as(decoder, tmp_path / "in")
    (tmp_path / "link.onnx").symlink_to(path)
    same_answers(tmp_path / "link.onnx", decoder, tmp_path / "out")


@pytest.mark.parametrize("link", [False, True])
def test_reads_a_bundle_in_a_hub_cache(
    own: Own, hub_cache: Callable, tmp_path: Path, link: bool
) -> None:
    sparsify_decoder(hub_cache(own.dense), tmp_path / "out", link=link)
    assert files(tmp_path / "out") == files(own.sparse)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


def test_refuses_an_old_opset(decoder: Foreign, tmp_path: Path) -> None:
    path = edited(decoder, tmp_path, lambda m: setattr(m.opset_import[0], "version", 17))
    fails(UnsupportedModelError, "opset 17; this toolkit reads 18 to 24", path, tmp_path)


def test_refuses_a_kv_cache(decoder: Foreign, tmp_path: Path) -> None:
    past = onnx.helper.make_tensor_value_info(
        "past_key_values.0.key", onnx.TensorProto.FLOAT, ["b", 2, "past", 16]
    )
    path = edited(decoder, tmp_path, lambda m: m.graph.input.append(past))
    fails(PreconditionError, "1 inputs of a KV cache.*use_cache=False", path, tmp_path)


def test_refuses_inputs_it_does_not_know(decoder: Foreign, tmp_path: Path) -> None:
    extra = onnx.helper.make_tensor_value_info("speed", onnx.TensorProto.FLOAT, [1])
    path = edited(decoder, tmp_path, lambda m: m.graph.input.append(extra))
    fails(UnsupportedModelError, r"inputs \['speed'\]; expected no others", path, tmp_path)


def test_refuses_a_damaged_graph(decoder: Foreign, tmp_path: Path) -> None:
    def of_no_type(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].data_type = 99

    path = edited(decoder, tmp_path, of_no_type)
    message = "cannot be read as a decoder .* Check it with onnx.checker, and export"
    fails(BundleError, message, path, tmp_path)


@pytest.mark.parametrize("kind", ["Range", "Expand"])
def test_large_constants_stay_nodes(decoder: Foreign, kind: str, tmp_path: Path) -> None:
    inputs = {"Range": (0, 10**9, 1), "Expand": ([1], [10**9])}[kind]

    def add(model: onnx.ModelProto) -> None:
        for number, value in enumerate(inputs):
            values = np.array(value, np.int64)
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(values, f"big{number}")
            )
        names = [f"big{number}" for number in range(len(inputs))]
        model.graph.node.insert(0, onnx.helper.make_node(kind, names, ["big"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("big", 7, None))

    path = edited(decoder, tmp_path, add)
    sparsify_decoder(path, tmp_path / "out", SparsityOptions(policy="norm", sparse_layer=1))
    dense = onnx.load(tmp_path / "out" / "llm" / "dense.onnx", load_external_data=False)
    assert kind in {node.op_type for node in dense.graph.node}


def test_refuses_fixed_sizes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_torchscript("sdpa", tmp_path, dynamic=False)
    fails(
        UnsupportedModelError,
        r"fixed sizes \[2, 7\] for batch and rows",
        tmp_path / "model.onnx",
        tmp_path,
    )


def test_says_where_a_pass_stopped(decoder: Foreign, tmp_path: Path) -> None:
    def forget_softmax(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.op_type = "Relu" if node.op_type == "Softmax" else node.op_type
            if node.op_type == "Relu":
                del node.attribute[:]

    path = edited(decoder, tmp_path, forget_softmax)
    fails(PreconditionError, "No attention was recognised", path, tmp_path)


def test_refuses_predictors_that_are_not_there(decoder: Foreign, tmp_path: Path) -> None:
    message = "without an image predictor.*--predictors, or .*attention, .*random, uniform"
    fails(UnsupportedModelError, message, decoder.path, tmp_path, SparsityOptions())


def test_refuses_predictors_of_another_width(
    own: Own, decoder: Foreign, tmp_path: Path
) -> None:
    fails(
        UnsupportedModelError,
        f"checkpoint read hidden states of width {HIDDEN}, the decoder .* has hidden size 64",
        decoder.path,
        tmp_path,
        SparsityOptions(sparse_layer=1),
        predictors=own.checkpoint,
    )


def test_refuses_a_checkpoint_without_predictors(own: Own, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "llava", "llava")
    fails(
        UnsupportedModelError,
        "is a llava checkpoint without predictors",
        own.dense,
        tmp_path,
        predictors=tmp_path / "llava",
    )


def test_refuses_a_location_that_is_no_checkpoint(own: Own, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    message = "is not a checkpoint"
    fails(CheckpointError, message, own.dense, tmp_path, predictors=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "norm", "sparse_layer": 2}, r"sparse_layer must be in 1\.\.1"),
        ({"policy": "norm", "image_keep_rate": 0.0}, r"image_keep_rate must be in \(0, 1\]"),
        ({"policy": "best"}, "policy must be one of"),
    ],
)
def test_refuses_settings_out_of_range(
    decoder: Foreign, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fails(ValueError, message, decoder.sparse, tmp_path, SparsityOptions(**options))


def test_refuses_a_folder_with_files_in_it(decoder: Foreign, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BundleError, match="is a folder with files in it"):
        sparsify_decoder(decoder.sparse, tmp_path, SparsityOptions(policy="norm"))


@pytest.mark.parametrize("name", [".", "again", "llm/again"])
def test_refuses_a_folder_inside_the_bundle(decoder: Foreign, name: str) -> None:
    with pytest.raises(BundleError, match=r"lies in .*sparse, which it is made from"):
        sparsify_decoder(decoder.sparse, decoder.sparse / name, SparsityOptions(policy="norm"))
