from __future__ import annotations

import resource
import sys
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tolerances
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM

from dllava_export import names
from dllava_export.bundles.files import save_models
from dllava_export.checkpoints.checkpoint import Checkpoint, random_checkpoint, read_checkpoint
from dllava_export.exporting.tracing import trace_decoder, trace_visual
from dllava_export.exporting.weights import CHECKPOINT_LOCATION, attach_weights

pytestmark = pytest.mark.slow

WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_checkpoint(folder: Path, **changes: object) -> Checkpoint:
    values = factory.make_checkpoint(folder, "llava", changes={**WIDE, **changes})
    if changes.get("tie_word_embeddings"):
        del values["lm_head.weight"]
        factory.write_files(
            folder, {factory.stored_key(name, "llava"): v for name, v in values.items()}
        )
    return read_checkpoint(folder)


def run(checkpoint: Checkpoint, model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    """Attach weights beside the checkpoint's own files, run, return the only output."""
    folder = checkpoint.path
    attach_weights({"model": model}, folder, checkpoint.tensors)
    save_models(folder, {"model.onnx": model})
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, feeds)
    return output


def torch_state(checkpoint: Checkpoint, *prefixes: str) -> dict[str, torch.Tensor]:
    return {
        name: factory.torch_tensor(source.read())
        for name, source in checkpoint.tensors.items()
        if name.startswith(prefixes)
    }


def llama_logits(checkpoint: Checkpoint, embeds: np.ndarray) -> np.ndarray:
    model = LlamaForCausalLM(checkpoint.spec.text_config).eval()
    model.load_state_dict(torch_state(checkpoint, "model.", "lm_head."))
    with torch.no_grad():
        return model(inputs_embeds=torch.from_numpy(embeds)).logits.numpy()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="MHA"),
        pytest.param({"num_key_value_heads": 2}, id="GQA"),
        pytest.param({"rope_scaling": LLAMA3}, id="llama3 rope"),
        pytest.param({"tie_word_embeddings": True}, id="tied embeddings"),
    ],
)
def test_decoder_equals_transformers(tmp_path, changes):
    checkpoint = make_checkpoint(tmp_path, **changes)
    embeds = np.random.default_rng(0).standard_normal((3, 40, 64)).astype(np.float32)
    positions = np.tile(np.arange(40), (3, 1))
    model = trace_decoder(checkpoint, torch.float32)
    logits = run(checkpoint, model, inputs_embeds=embeds, position_ids=positions)
    # Two float32 kernels that sum in another order.
    np.testing.assert_allclose(
        logits,
        llama_logits(checkpoint, embeds),
        rtol=tolerances.RELATIVE,
        atol=tolerances.SAME_MODEL,
    )


def test_visual_graph_equals_clip_and_projector(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 28, 28)).astype(np.float32)
    model = trace_visual(checkpoint, torch.float32)
    features = run(checkpoint, model, pixel_values=pixels)
    tower = CLIPVisionModel(checkpoint.spec.vision_config).eval()
    prefixes = tuple({name.split(".")[0] for name in tower.state_dict()})
    tower.load_state_dict(torch_state(checkpoint, *(f"{prefix}." for prefix in prefixes)))
    first, second = torch.nn.Linear(8, 64), torch.nn.Linear(64, 64)
    projector = torch.nn.Sequential(first, torch.nn.GELU(), second)
    state = torch_state(checkpoint, "projector.")
    projector.load_state_dict({k.removeprefix("projector."): v for k, v in state.items()})
    with torch.no_grad():
        states = tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        expected = projector(states[-2][:, 1:]).numpy()
    assert features.shape == (3, checkpoint.spec.num_image_tokens, 64)
    np.testing.assert_allclose(
        features, expected, rtol=tolerances.RELATIVE, atol=tolerances.SAME_MODEL
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A traced decoder in half precision, and its checkpoint."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("dense") / "checkpoint")
    return trace_decoder(checkpoint, torch.float16), checkpoint


def test_inputs_and_outputs_have_their_names_and_shapes(dense):
    graph = dense[0].graph
    found = {
        value.name: [
            dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim
        ]
        for value in (*graph.input, *graph.output)
    }
    assert found == {
        names.INPUTS_EMBEDS: [names.BATCH, names.ROWS, 64],
        names.POSITION_IDS: [names.BATCH, names.ROWS],
        names.LOGITS: [names.BATCH, names.ROWS, factory.VOCAB],
    }


def test_weights_have_names_and_no_data(dense):
    model, checkpoint = dense
    external = [t for t in model.graph.initializer if t.external_data]
    expected = {n for n in checkpoint.tensors if n.startswith(("model.", "lm_head."))}
    assert {t.name for t in external} == expected - {"model.embed_tokens.weight"}
    assert {t.data_type for t in external} == {onnx.TensorProto.FLOAT16}
    for tensor in external:
        assert tensor.external_data[0].value == CHECKPOINT_LOCATION
        assert not tensor.raw_data


def test_graph_names_the_opset_and_no_source_lines(dense):
    model = dense[0]
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets[""] == names.OPSET
    assert not model.metadata_props
    assert not any(node.metadata_props for node in model.graph.node)


def test_screen_stays_quiet(tmp_path, capfd):
    trace_visual(make_checkpoint(tmp_path), torch.float32)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_needs_no_memory_for_weights(tmp_path):
    """One layer of 8192 and the head hold 4 GB in float32."""
    config = {
        **factory.ORIGINAL_CONFIG,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 1,
        "vocab_size": 32000,
        "vision_config": factory.VISION_CONFIG,
    }
    factory.write_json(tmp_path / "config.json", config)
    checkpoint = random_checkpoint(tmp_path / "config.json")
    before = peak_memory()
    trace_decoder(checkpoint, torch.float32)
    assert peak_memory() - before < 0.5e9


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
