"""The contract of a model family: everything that differs between one kind of VLM and another.

    config.json ─► detect ─► layout ─► describe ─► ModelSpec ─► decoder, visual ─► tracing
    keys of the weight files ─► renames ─► canonical names ─► compared with the spec's modules

To add a family, write `families/<name>.py` with a `Family` and a `ModelSpec`, and list it in
`registry.py`, or in another package under the entry point group that is named there. The module
must not import torch or transformers at the top: a runtime asks a family for its position rule.

Canonical names of tensors are the same whatever the layout on disk: `model.*` (a decoder, as
transformers spells it) and `lm_head.weight`, `image_predictor.*` and `output_text_predictor.*`,
and for all that turns pictures into features what the family's visual module calls it.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from dllava_export import names
from dllava_export.families.config_kinds import Kinds
from dllava_export.families.positions import PositionRule, SequentialPositions
from dllava_export.geometry import Geometry, PredictorConfig, PredictorGeometry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


__all__ = [
    "ChatTemplate",
    "Family",
    "ImageRows",
    "Layout",
    "ModelSpec",
    "OutsideTower",
    "Renames",
    "RowInput",
    "Traceable",
]

Layout = str
"""How a checkpoint is laid out on disk: a word of its family's, for people and manifests."""

ChatTemplate = Literal["vicuna_v1", "checkpoint"]
"""`vicuna_v1`, which LLaVA's tokenizers lack, or the template beside the tokenizer."""


@dataclasses.dataclass(frozen=True)
class Renames:
    """How a layout spells canonical names.

    Attributes:
        prefixes: (prefix in the checkpoint, canonical prefix). The longest one that fits wins,
            in both directions; of equally long ones the first.
        ignored: Keys of no use to the model, such as those of a text tower.
    """

    prefixes: tuple[tuple[str, str], ...]
    ignored: re.Pattern[str] | None = None

    def canonical(self, key: str) -> str | None:
        """Return the canonical name of a key, or None where it has none."""
        return _replaced(key, self.prefixes)

    def stored(self, name: str) -> str:
        """Return how the checkpoint spells a canonical name; the name itself if unknown."""
        back = tuple((canonical, stored) for stored, canonical in self.prefixes)
        return _replaced(name, back) or name

    def is_ignored(self, key: str) -> bool:
        """Return whether the key is of no use."""
        return self.ignored is not None and self.ignored.match(key) is not None


def _replaced(name: str, prefixes: Iterable[tuple[str, str]]) -> str | None:
    fitting = [(old, new) for old, new in prefixes if name.startswith(old)]
    if not fitting:
        return None
    old, new = max(fitting, key=lambda pair: len(pair[0]))
    return new + name.removeprefix(old)


@dataclasses.dataclass(frozen=True)
class OutsideTower:
    """A vision tower that `config.json` names, because the checkpoint need not hold it.

    Attributes:
        config_key: The key of `config.json` that names it, for messages.
        name: A folder, seen from the checkpoint's, or a hub id.
        stored_prefix: Prefix of the tower's keys where the checkpoint holds them after all.
        config: The tower's configuration where it is known without its folder.
        renames: How the tower's own folder spells its tensors.
    """

    config_key: str
    name: str | None
    stored_prefix: str
    config: Mapping[str, Any] | None
    renames: Renames


@dataclasses.dataclass(frozen=True)
class RowInput:
    """An input of the decoder with an entry per row, beyond embeddings and `position_ids`.

    Attributes:
        name: Of the graph input, [batch, rows, ...]; its sizes stand in the traced example.
        dtype: `int64`, or `float` for the type of the activations.
    """

    name: str
    dtype: Literal["int64", "float"]


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """What one image puts into a prompt.

    Attributes:
        features: [rows, hidden_size]. Stand in for token embeddings.
        token_kind: [rows] int64: `names.IMAGE` for rows that may be dropped, else
            `names.PROMPT_TEXT`.
    """

    features: np.ndarray
    token_kind: np.ndarray


def _same(name: str) -> str:
    return name


@dataclasses.dataclass(frozen=True)
class Traceable:
    """A module to trace, and how.

    Attributes:
        module: On the meta device, float32; `tracing.trace` gives it the type wanted. Its
            parameters are weights of the checkpoint.
        example: Arguments of `forward`, on the meta device. No size may be 0 or 1.
        inputs: Names of the arguments, in order, each with its symbolic axes:
            axis → dimension. They become the graph's inputs.
        outputs: Names of the results.
        buffers: End of a name → values: buffers that no checkpoint stores.
        canonical: Gives the canonical name of a parameter of `module`.
    """

    module: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    inputs: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    buffers: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    canonical: Callable[[str], str] = _same

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return canonical name → shape of the tensors that a checkpoint must hold."""
        return {
            self.canonical(name): tuple(tensor.shape)
            for name, tensor in self.module.state_dict().items()
        }


@dataclasses.dataclass(frozen=True)
class ModelSpec(abc.ABC):
    """What a configuration says about one model. Families add what their modules need.

    Attributes:
        layout: How the checkpoint is laid out.
        text_config: The decoder, cut to the layers asked for.
        vision_config: The vision tower.
        predictors: The trained predictors, or None.
        num_stored_layers: Decoder layers in the checkpoint, before the cut.
        num_image_tokens: Rows an image takes in the prompt; 0 where that depends on the image.
        image_token_id: Id that stands for the image in a prompt; `names.IMAGE_PLACEHOLDER_ID`
            where the vocabulary has no image token.
        image_aspect_ratio: `pad` (to a square, before resizing) or `square` (resize the short
            side and crop the centre).
        chat_template: How a conversation is written.
    """

    layout: Layout
    text_config: PreTrainedConfig
    vision_config: PreTrainedConfig
    predictors: PredictorConfig | None
    num_stored_layers: int
    num_image_tokens: int
    image_token_id: int
    image_aspect_ratio: str
    chat_template: ChatTemplate

    @property
    def num_layers(self) -> int:
        """Decoder layers, those that were cut off not counted."""
        return int(self.text_config.num_hidden_layers)

    @property
    def max_position_embeddings(self) -> int:
        """Tokens the decoder was made for."""
        return int(self.text_config.max_position_embeddings)

    @property
    def ties_embeddings(self) -> bool:
        """True where `lm_head.weight` is `model.embed_tokens.weight`, unless stored apart."""
        return bool(getattr(self.text_config, "tie_word_embeddings", False))

    @abc.abstractmethod
    def decoder(self) -> Traceable:
        """Return the decoder from embeddings to logits, causal without a mask.

        Its first inputs are `inputs_embeds` [batch, rows, hidden_size] and `position_ids`
        [batch, rows] int64, then the family's `row_inputs`; its output is `logits` [batch,
        rows, vocab_size]. `model.embed_tokens.weight` is among its parameters.
        """

    @abc.abstractmethod
    def visual(self) -> Traceable:
        """Return what turns prepared pictures into `image_features` [..., hidden_size]."""

    @abc.abstractmethod
    def preprocessor(self) -> dict[str, Any]:
        """Return `preprocessor_config.json` for a checkpoint that has none."""

    @property
    def geometry(self) -> Geometry:
        """The sizes of the model."""
        text = self.text_config
        predictor = None
        if self.predictors is not None:
            predictor = PredictorGeometry(
                self.predictors.d_model,
                self.predictors.nhead,
                self.predictors.dim_feedforward,
                self.predictors.num_layers,
            )
        return Geometry(
            num_layers=self.num_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            # Not every configuration class has a head_dim.
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            vocab_size=text.vocab_size,
            num_image_tokens=self.num_image_tokens,
            predictor=predictor,
        )


class Family(abc.ABC):
    """A kind of VLM. Instances hold no state.

    Attributes:
        name: In manifests, and in the registry.
        title: What its checkpoints are called, for help and messages.
        architectures: `architectures` of the configurations it reads, for messages.
        positions: Its position rule.
        row_inputs: What the decoder reads for each row besides embeddings and `position_ids`.
        config_kinds: What the values of its `config.json` may be, as for
            `config_file.check_kinds`: checked before anything else is asked of the family.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    positions: ClassVar[PositionRule] = SequentialPositions()
    row_inputs: ClassVar[tuple[RowInput, ...]] = ()
    config_kinds: ClassVar[Kinds] = {}

    @abc.abstractmethod
    def detect(
        self, config: Mapping[str, Any], *, bare_decoder: bool = False
    ) -> Layout | None:
        """Return how the checkpoint is laid out, or None if it is of another family.

        Args:
            config: The parsed `config.json`.
            bare_decoder: Take the configuration of a decoder alone too, and complete it with
                defaults; for random weights.

        Raises:
            UnsupportedModelError: If it is of this family, but of a kind that is not handled.
            CheckpointError: If something is missing that such a model needs.
        """

    @abc.abstractmethod
    def renames(
        self, config: Mapping[str, Any], layout: Layout, keys: Iterable[str]
    ) -> Renames:
        """Return how the checkpoint spells canonical names.

        Args:
            config: The parsed `config.json`.
            layout: From `detect`.
            keys: Of all tensors in the checkpoint's files.
        """

    def outside_tower(self, config: Mapping[str, Any], layout: Layout) -> OutsideTower | None:
        """Return where a tower lies that may be outside the checkpoint; None: it may not.

        Args:
            config: The parsed `config.json`.
            layout: From `detect`.
        """
        return None

    @abc.abstractmethod
    def describe(
        self,
        config: Mapping[str, Any],
        layout: Layout,
        *,
        tower: Mapping[str, Any] | None = None,
        preprocessor: Mapping[str, Any] | None = None,
        num_decoder_layers: int | None = None,
    ) -> ModelSpec:
        """Return the model that a configuration describes.

        Args:
            config: The parsed `config.json`.
            layout: From `detect`.
            tower: The configuration of a tower that `outside_tower` names.
            preprocessor: The image processor's settings, where the checkpoint has any.
            num_decoder_layers: Keep only the first so many decoder layers; all by default.

        Raises:
            UnsupportedModelError: If a part is of a kind that is not handled.
            CheckpointError: If values are missing or impossible.
            SettingError: If `num_decoder_layers` is not in 1..num_hidden_layers.
        """

    def image_rows(self, features: np.ndarray) -> list[ImageRows]:
        """Return the prompt rows of each image.

        Args:
            features: [num_images, num_features, hidden_size]. What the visual graph gives.
        """
        kinds = np.full(features.shape[1], names.IMAGE, np.int64)
        return [ImageRows(image, kinds) for image in features]
