"""A tokenizer for golden checkpoint `mha`, which comes without one."""

from __future__ import annotations

import json
from pathlib import Path

VOCAB_SIZE = 131
SPECIAL_WORDS = ("<unk>", "<s>", "</s>")


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one word per id, that starts texts with `<s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL_WORDS, *(f"w{i}" for i in range(len(SPECIAL_WORDS), VOCAB_SIZE))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_WORDS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
