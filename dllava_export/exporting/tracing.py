"""Trace transformers' modules to dense ONNX graphs, on the meta device: no weight is loaded.

Weights appear as initializers that name their tensor and hold no data; `weights.attach_weights`
gives them a place on disk afterwards. So exporting 7B costs no more memory than its graph.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dllava_export import names

if TYPE_CHECKING:
    import onnx
    import torch

    from dllava_export.checkpoints.checkpoint import Checkpoint, ProjectorConfig


__all__ = ["projector_module", "quiet_exporter", "trace_decoder", "trace_visual"]

logger = logging.getLogger(__name__)

_TOWER = "tower."
"""Prefix of the tower in the traced module; canonical names have none."""


def trace_decoder(checkpoint: Checkpoint, dtype: torch.dtype) -> onnx.ModelProto:
    """Trace the dense decoder.

    Args:
        checkpoint: Gives the decoder's configuration.
        dtype: Precision of weights and activations.

    Returns:
        inputs_embeds [batch, rows, hidden_size], position_ids [batch, rows] int64 →
        logits [batch, rows, vocab_size].
    """
    import torch
    from transformers import LlamaForCausalLM

    class Decoder(torch.nn.Module):
        """The layers one after another; causal by construction, so that no mask is traced."""

        def __init__(self, language_model: LlamaForCausalLM) -> None:
            super().__init__()
            self.model = language_model.model
            self.lm_head = language_model.lm_head

        def forward(
            self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor
        ) -> torch.Tensor:
            rotary = self.model.rotary_emb(inputs_embeds, position_ids)
            hidden = inputs_embeds
            for layer in self.model.layers:
                hidden = layer(hidden, position_embeddings=rotary)
            return self.lm_head(self.model.norm(hidden))

    config = checkpoint.text_config
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        decoder = Decoder(LlamaForCausalLM(config)).to(dtype=dtype).eval()
        example = (
            torch.zeros(2, 7, config.hidden_size, dtype=dtype),
            torch.zeros(2, 7, dtype=torch.long),
        )
    batch, rows = torch.export.Dim(names.BATCH), torch.export.Dim(names.ROWS)
    buffers = {"model.rotary_emb.inv_freq": _inverse_frequencies(checkpoint)}
    return _trace(
        decoder,
        example,
        inputs=[names.INPUTS_EMBEDS, names.POSITION_IDS],
        outputs=[names.LOGITS],
        dynamic={
            names.INPUTS_EMBEDS: {0: batch, 1: rows},
            names.POSITION_IDS: {0: batch, 1: rows},
        },
        buffers=buffers,
    )


def trace_visual(checkpoint: Checkpoint, dtype: torch.dtype) -> onnx.ModelProto:
    """Trace CLIP tower and projector.

    Returns:
        pixel_values [batch, 3, image_size, image_size] → image_features [batch,
        num_image_tokens, hidden_size], both of `dtype`.
    """
    import torch
    from transformers import CLIPVisionModel

    feature_layer = checkpoint.vision_feature_layer

    class Visual(torch.nn.Module):
        """Hidden states of one tower layer, class token dropped, projected."""

        def __init__(self, tower: CLIPVisionModel, projector: torch.nn.Module) -> None:
            super().__init__()
            self.tower = tower
            self.projector = projector

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states
            return self.projector(states[feature_layer][:, 1:])

    config = checkpoint.vision_config
    config._attn_implementation = "sdpa"
    size = config.image_size
    assert isinstance(size, int)  # checked when the checkpoint was read
    with torch.device("meta"):
        visual = Visual(CLIPVisionModel(config), projector_module(checkpoint.projector))
        visual = visual.to(dtype=dtype).eval()
        example = (torch.zeros(2, config.num_channels, size, size, dtype=dtype),)
    num_positions = checkpoint.num_image_tokens + 1
    position_ids = torch.arange(num_positions).unsqueeze(0)
    return _trace(
        visual,
        example,
        inputs=[names.PIXEL_VALUES],
        outputs=[names.IMAGE_FEATURES],
        dynamic={names.PIXEL_VALUES: {0: torch.export.Dim(names.BATCH)}},
        buffers={"position_ids": position_ids},
    )


def projector_module(config: ProjectorConfig) -> torch.nn.Sequential:
    """Return Linear, (activation, Linear)...: as numbered in the original checkpoints."""
    import torch
    from transformers.activations import ACT2FN

    out_features = config.out_features
    layers = [torch.nn.Linear(config.in_features, out_features, bias=config.bias)]
    for _ in range(1, config.num_layers):
        layers += [
            ACT2FN[config.hidden_act],
            torch.nn.Linear(out_features, out_features, bias=config.bias),
        ]
    return torch.nn.Sequential(*layers)


def _inverse_frequencies(checkpoint: Checkpoint) -> torch.Tensor:
    """Return the rotary frequencies, which no checkpoint stores, [head_dim / 2] float32."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(checkpoint.text_config).inv_freq.float()


def _trace(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    *,
    inputs: list[str],
    outputs: list[str],
    dynamic: dict[str, dict[int, object]],
    buffers: dict[str, torch.Tensor],
) -> onnx.ModelProto:
    """Trace, then let ONNX Script's optimizer tidy up the graph without looking at weights."""
    import onnx_ir as ir
    import onnxscript.optimizer
    import torch

    from dllava_export.exporting.weights import CHECKPOINT_LOCATION

    with torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=names.OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            optimize=False,  # it would ask the meta device for data; done below
            verbose=False,
        )
    assert program is not None
    model = program.model
    weights: dict[str, tuple[ir.Value, ir.TensorProtocol]] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not getattr(getattr(tensor, "raw", None), "is_meta", False):
            continue
        buffer = next((data for key, data in buffers.items() if name.endswith(key)), None)
        if buffer is not None:
            value.const_value = ir.tensor(buffer.numpy(), name=name)
            continue
        # As graph inputs, weights are out of the optimizer's reach.
        value.const_value = None
        del model.graph.initializers[name]
        model.graph.inputs.append(value)
        weights[name.removeprefix(_TOWER)] = value, tensor
    with quiet_exporter():
        onnxscript.optimizer.optimize_ir(model)
    for name, (value, tensor) in weights.items():
        model.graph.inputs.remove(value)
        if not value.uses():  # such as the part of the tower above the feature layer
            continue
        value.name = name
        value.const_value = ir.ExternalTensor(
            CHECKPOINT_LOCATION,
            None,
            None,
            tensor.dtype,
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            base_dir="",
        )
        model.graph.initializers[name] = value
    proto = ir.serde.serialize_model(model)
    for entry in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input):
        del entry.metadata_props[:]  # PyTorch's source lines: of no use to anyone downstream
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    return proto


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress lines and version warnings off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for noisy in loggers:
        noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for noisy, level in zip(loggers, levels, strict=True):
            noisy.setLevel(level)
