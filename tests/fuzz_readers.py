"""Every reader of files that users bring: a valid input, how it is mutated, how it is read."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import numpy as np
from engine_folders import BACKEND, write_bundle_with_engines
from fuzz_mutations import (
    Mutation,
    mutated_bytes,
    mutated_json,
    mutated_lines,
    mutated_onnx,
    mutated_safetensors,
    mutated_state_dict,
)
from PIL import Image
from word_tokenizer import save_tokenizer

import dllava_export
from dllava_export.backends.trt.engine_config import read_engine_config
from dllava_export.checkpoints.checkpoint import random_checkpoint, read_checkpoint
from dllava_export.evaluation.questions import read_questions
from dllava_export.prompts.images import ImageProcessor
from dllava_export.prompts.tokenizer import ChatTokenizer
from dllava_export.training.data import ConversationData

__all__ = ["READERS", "Reader"]

_SPARSITY = {"sparse_layer": 1, "image_keep_rate": 0.5}
_CLIP = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "resample": 3,
}
_PREPROCESSOR = {
    **_CLIP,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.2],
}
_TURNS = [{"from": "human", "value": "<image>\nw5 w6"}, {"from": "gpt", "value": "w7 w8"}]
_CONVERSATIONS = [
    {"id": "7", "image": "picture.png", "conversations": _TURNS},
    {"id": 8, "conversations": [{"from": "human", "value": "w3"}, _TURNS[1]]},
]
_QUESTIONS = [
    {"question_id": 7, "image": "picture.png", "text": "w5", "answer": "w6", "category": "c"},
    {"question_id": 8, "text": "w5 w6", "answer": "w7"},
]
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
    "{% if p.type == 'image' %}<image>\n{% else %}{{ p.text }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

_MUTATIONS: dict[str, Mutation] = {
    ".json": mutated_json,
    ".jsonl": mutated_lines,
    ".safetensors": mutated_safetensors,
    ".bin": mutated_state_dict,
    ".onnx": mutated_onnx,
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: What it reads.
        make: Writes valid inputs into a folder and returns the files that are mutated.
        read: Reads the folder; gets the file that was mutated as well.
        refused: Names of files that are refused as they are, with an error of ours.
        share: Inputs of this reader for each one of a fast reader.
    """

    name: str
    make: Callable[[Path], list[Path]]
    read: Callable[[Path, Path], Any]
    refused: tuple[str, ...] = ()
    share: float = 1.0

    def mutate(self, rng: random.Random, file: Path) -> None:
        """Mutate a file in place."""
        mutation = _MUTATIONS.get(file.suffix, mutated_bytes)
        file.write_bytes(mutation(rng, file.read_bytes()))


def _make_configs(folder: Path) -> list[Path]:
    for layout in ("llava", "dynamic-llava", "llava-hf"):
        factory.make_checkpoint(folder / layout, layout, tower="folder")
    configs = [
        folder / layout / "config.json" for layout in ("llava", "dynamic-llava", "llava-hf")
    ]
    return [*configs, folder / "llava" / "vision_tower" / "config.json"]


def _read_config(_: Path, file: Path) -> None:
    is_tower = file.parent.name == "vision_tower"
    checkpoint = file.parent.parent if is_tower else file.parent
    read_checkpoint(checkpoint)
    random_checkpoint(checkpoint / "config.json")


def _make_safetensors(folder: Path) -> list[Path]:
    factory.make_checkpoint(folder / "one")
    factory.make_checkpoint(folder / "two", files="sharded")
    return sorted(folder.glob("*/*.safetensors"))


def _make_bins(folder: Path) -> list[Path]:
    factory.make_checkpoint(folder / "one", files="bin")
    factory.make_checkpoint(folder / "two", files="sharded bin")
    return sorted(folder.glob("*/*.bin"))


def _make_indexes(folder: Path) -> list[Path]:
    factory.make_checkpoint(folder / "one", files="sharded")
    factory.make_checkpoint(folder / "two", files="sharded bin")
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": "base", "peft_type": "LORA"}
    factory.write_json(adapter / "adapter_config.json", settings)
    return [*sorted(folder.glob("*/*.index.json")), adapter / "adapter_config.json"]


def _read_weights(_: Path, file: Path) -> None:
    for source in read_checkpoint(file.parent).tensors.values():
        source.read()


def _make_preprocessors(folder: Path) -> list[Path]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        one = folder / name.partition("_")[0]
        factory.make_checkpoint(one, "llava-hf")
        is_nested = name == "processor_config.json"
        value = {"image_processor": _PREPROCESSOR} if is_nested else _PREPROCESSOR
        factory.write_json(one / name, value)
    return sorted(folder.glob("*/*processor_config.json"))


def _read_preprocessor(_: Path, file: Path) -> None:
    settings = read_checkpoint(file.parent).preprocessor
    pixels = ImageProcessor.from_config(settings, "pad")([np.zeros((5, 7, 3), np.uint8)])
    assert np.isfinite(pixels).all()


def _make_tokenizer(folder: Path) -> list[Path]:
    save_tokenizer(folder)
    factory.write_json(folder / "special_tokens_map.json", {"eos_token": "</s>"})
    factory.write_json(folder / "chat_template.json", {"chat_template": _TEMPLATE})
    return sorted(folder.glob("*.json"))


def _make_generation(folder: Path) -> list[Path]:
    save_tokenizer(folder)
    factory.write_json(folder / "generation_config.json", {"eos_token_id": [2, 5], "top_p": 1})
    return [folder / "generation_config.json"]


def _read_tokenizer(folder: Path, _: Path) -> None:
    for template in ("vicuna_v1", "checkpoint"):
        if template == "checkpoint" and not (folder / "chat_template.json").is_file():
            continue
        chat = ChatTokenizer.from_folder(folder, template=template, image_token_id=-200)
        ids = chat.encode(chat.render("w5 w6", with_image=True))
        chat.decode(ids)
        chat.encode_follow_up("w7")
        assert all(type(token) is int for token in chat.eos_token_ids)


def _make_bundle(folder: Path) -> list[Path]:
    """Write a bundle with tokenizer; all but the manifest is as its digests say."""
    source = folder / "checkpoint"
    factory.make_checkpoint(source, "llava")
    save_tokenizer(source)
    dllava_export.export(source, folder / "bundle", policy="uniform", **_SPARSITY)
    shutil.rmtree(source)
    return [folder / "bundle" / "dllava_export.json"]


def _read_bundle(folder: Path, _: Path) -> None:
    bundle = folder / "bundle"
    with dllava_export.load(bundle, num_threads=1) as session:
        session.prefill([[3, 4, 5]], max_new_tokens=2)
    dllava_export.inspect(bundle)


def _make_decoder(folder: Path) -> list[Path]:
    """Write the dense decoder of a bundle as another exporter's, configuration beside it."""
    (_,) = _make_bundle(folder)
    (folder / "bundle" / "llm").rename(folder / "dense")
    shutil.rmtree(folder / "bundle")
    for name in ("model.onnx", "recompute.onnx"):
        (folder / "dense" / name).unlink()
    return [folder / "dense" / "dense.onnx"] * 5 + [folder / "dense" / "config.json"]


def _read_decoder(folder: Path, _: Path) -> None:
    source = folder / "dense" / "dense.onnx"
    dllava_export.sparsify(source, folder / "out", policy="uniform", **_SPARSITY)


def _make_engines(folder: Path) -> list[Path]:
    bundle = write_bundle_with_engines(folder / "bundle")
    return sorted(bundle.glob("engines/*/config.json"))


def _read_engines(folder: Path, _: Path) -> None:
    read_engine_config(folder / "bundle", BACKEND)


def _save_picture(folder: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(folder / "picture.png")


def _make_questions(folder: Path) -> list[Path]:
    _save_picture(folder)
    lines = "\n".join(json.dumps(question) for question in _QUESTIONS)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    factory.write_json(folder / "questions.json", _QUESTIONS)
    factory.write_json(folder / "conversations.json", _CONVERSATIONS)
    return sorted(folder.glob("*.json*"))


def _read_questions(_: Path, file: Path) -> None:
    list(read_questions(file))


def _make_conversations(folder: Path) -> list[Path]:
    _save_picture(folder)
    (folder / "tokenizer").mkdir()
    save_tokenizer(folder / "tokenizer")
    factory.write_json(folder / "conversations.json", _CONVERSATIONS)
    return [folder / "conversations.json"]


def _read_conversations(folder: Path, file: Path) -> None:
    ConversationData.read(
        file,
        image_folder=None,
        needs_image=False,
        tokenizer=ChatTokenizer.from_folder(
            folder / "tokenizer", template="vicuna_v1", image_token_id=-200
        ),
        image_processor=ImageProcessor.from_config(_PREPROCESSOR, "pad"),
        num_image_tokens=4,
        max_length=100,
        vocab_size=131,
    )


READERS = (
    Reader("checkpoint config", _make_configs, _read_config),
    Reader("safetensors header", _make_safetensors, _read_weights),
    Reader(".bin weights", _make_bins, _read_weights),
    Reader("shard index and adapter", _make_indexes, _read_weights, ("adapter_config.json",)),
    Reader("preprocessor config", _make_preprocessors, _read_preprocessor),
    Reader("tokenizer files", _make_tokenizer, _read_tokenizer),
    Reader("generation config", _make_generation, _read_tokenizer),
    Reader("engine config", _make_engines, _read_engines),
    Reader("questions", _make_questions, _read_questions),
    Reader("conversations", _make_conversations, _read_conversations),
    Reader("bundle manifest", _make_bundle, _read_bundle, share=0.3),
    Reader("ONNX decoder", _make_decoder, _read_decoder, share=0.3),
)
