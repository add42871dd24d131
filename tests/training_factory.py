"""A tiny checkpoint with a tokenizer of words, and conversations about random pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from golden import DATA
from PIL import Image
from safetensors.numpy import load_file, save_file
from word_tokenizer import save_tokenizer

from dllava_export.prompts.images import ImageProcessor
from dllava_export.prompts.tokenizer import ChatTokenizer
from dllava_export.runtime.session import Session
from dllava_export.sparsity import num_kept_tokens
from dllava_export.training.data import Batch, ConversationData
from dllava_export.training.model import TrainingModel

IMAGE_TOKENS = 36
PREDICTOR_SIZES = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "num_layers": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dynamic_llava(folder: Path) -> Path:
    """Write the golden checkpoint with a tokenizer."""
    path = folder / "dynamic"
    if not path.exists():
        shutil.copytree(DATA / "mha", path, copy_function=shutil.copyfile)
        save_tokenizer(path)
    return path


def plain_llava(folder: Path) -> Path:
    """Write the same without predictors."""
    path = folder / "plain"
    if path.exists():
        return path
    shutil.copytree(dynamic_llava(folder), path, copy_function=shutil.copyfile)
    config = json.loads((path / "config.json").read_text())
    del config["sparse_config"]
    config |= {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensors[name] for name in tensors if "score_predictor" not in name}
    (path / "model.safetensors").unlink()
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    return path


def words(num: int, first: int = 3) -> str:
    """Return so many words of the vocabulary, `w{first}` and on."""
    return " ".join(f"w{3 + (first - 3 + i) % 127}" for i in range(num))


def record(
    image: str | None = "0.png", *answers: str, question: str = "<image>\nw5 w6"
) -> dict[str, Any]:
    """Return a record; questions after the first are `w9`."""
    turns = []
    for number, answer in enumerate(answers or ("w7 w8",)):
        turns.append({"from": "human", "value": "w9" if number else question})
        turns.append({"from": "gpt", "value": answer})
    found = {"id": "a", "conversations": turns}
    return found if image is None else {**found, "image": image}


def write_data(folder: Path, records: Sequence[Any], num_images: int = 4) -> Path:
    """Write a JSON file and random pictures `0.png` and on beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for number in range(num_images):
        pixels = rng.integers(0, 256, (84, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    path = folder / "chats.json"
    path.write_text(json.dumps(records))
    return path


def mixed_records(num: int = 5) -> list[dict[str, Any]]:
    """Return records with answers of 10 and of 55 words in turn."""
    return [record(f"{i % 4}.png", words(55 if i % 2 else 10, 3 + 5 * i)) for i in range(num)]


def read_data(checkpoint: Path, path: Path, **changes: Any) -> ConversationData:
    """Read a file as a run with the golden checkpoint does."""
    settings = {
        "image_folder": None,
        "needs_image": True,
        "tokenizer": ChatTokenizer.from_folder(
            checkpoint, template="vicuna_v1", image_token_id=-200
        ),
        "image_processor": ImageProcessor.from_config(
            {"size": {"shortest_edge": 84}, "crop_size": 84}, "pad"
        ),
        "num_image_tokens": IMAGE_TOKENS,
        "max_length": 512,
        "vocab_size": 131,
    }
    return ConversationData.read(path, **{**settings, **changes})


def inference_keep_mask(
    model: TrainingModel, hidden: torch.Tensor, prompt_len: int, is_image: torch.Tensor
) -> torch.Tensor:
    """Decide as inference does, [1, rows]: the best images, and text by its two logits."""
    rows = hidden[is_image][None]
    scores = model.image_predictor(rows)[0].log_softmax(-1)[:, 0]
    num_kept = num_kept_tokens(len(scores), model._predictors.vision_keep_rate)
    image_keep = torch.zeros(len(scores))
    image_keep[scores.topk(num_kept).indices] = 1
    keep = torch.ones(hidden.shape[:2])
    keep[is_image] = image_keep
    logits = model.output_text_predictor(hidden[0, prompt_len:])
    keep[0, prompt_len:] = (logits[:, 0] > logits[:, 1]).float()
    return keep


def assert_session_equals_training(
    session: Session, model: TrainingModel, batch: Batch
) -> None:
    """Check an exported decoder against one masked forward pass over the second sample.

    The decoder is fed its prompt, then its answer token by token.
    """
    length = int(batch.is_answer[1].nonzero()[-1]) + 1
    is_image = batch.is_image[1:, :length]
    prompt_len = int(batch.is_answer[1].nonzero()[0])
    ids = batch.input_ids[1, :length].numpy()
    embeds = model.embed(batch)[1:, :length]
    masks = []

    def choose(hidden):
        masks.append(inference_keep_mask(model, hidden, prompt_len, is_image))
        return masks[-1]

    with torch.no_grad():
        logits = model.logits(model.decode(embeds, choose))[0].numpy()
    prefill = session.prefill([ids[:prompt_len]], batch.pixel_values[1:].numpy())
    kept = masks[0][is_image].nonzero()[:, 0].tolist()
    assert prefill.kept_image_indices[0].tolist() == kept
    steps = [session.decode(ids[row : row + 1]) for row in range(prompt_len, length)]
    assert [bool(step.keep[0]) for step in steps] == masks[0][0, prompt_len:].bool().tolist()
    found = np.concatenate([prefill.logits, *(step.logits for step in steps)])
    np.testing.assert_allclose(found, logits[prompt_len - 1 :], atol=tolerances.TRAINED)
