"""Turn by turn equals the whole conversation, for every kind of tokenizer and template."""

from __future__ import annotations

import itertools
import json
import string

import pytest

from dllava_export.families.chat_templates import named_templates
from dllava_export.prompts.tokenizer import ChatTokenizer

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n▁"
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
LLAVA_HF = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}"
    "{% endif %}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', "
    "'text') %}{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}"
    "{% endgeneration %}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text | trim }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSED = (
    "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}"
    "<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}assistant:"
)
TEMPLATES = {"llava-hf": LLAVA_HF, "chatml of a file": CHATML, "closed by </s>": CLOSED}


def sentencepiece_like(normalizer, pre_tokenizer):
    from tokenizers import Tokenizer, decoders, models

    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("U", "S"), ("E", "R"), ("▁", "US")]
    vocabulary = [*SPECIAL, *CHARACTERS, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(dict.fromkeys(vocabulary))}, merges,
                   unk_token="<unk>")
    )  # fmt: skip
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return tokenizer


def legacy():
    """LLaMA's tokenizer.json of old: each piece between special tokens gets a space."""
    from tokenizers import normalizers

    return sentencepiece_like(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None
    )


def metaspace(scheme):
    from tokenizers import pre_tokenizers

    return sentencepiece_like(
        None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    )


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("Ġc", "a"), ("U", "S"), ("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "US")]
    vocabulary = [*SPECIAL, *letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS = {
    "legacy": legacy,
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace never": lambda: metaspace("never"),
    "byte-level": byte_level,
}


def make(folder, tokenizer, template):
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config["chat_template"] = TEMPLATES.get(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    name = "checkpoint" if template in TEMPLATES else template
    return ChatTokenizer.from_folder(folder, template=name, image_token_id=3)


CASES = list(itertools.product(TOKENIZERS, [*named_templates(), *TEMPLATES]))


@pytest.mark.parametrize(("tokenizer", "template"), CASES, ids=lambda name: name)
def test_turn_by_turn_equals_the_whole_conversation(tmp_path, tokenizer, template):
    chat = make(tmp_path, TOKENIZERS[tokenizer](), template)
    history = [("What is it?", "a cat"), ("Is it red?", "it is 7")]
    whole = chat.encode(chat.render("Why?", with_image=True, history=history)).tolist()
    # What the model is fed: the first prompt, an answer, a question, an answer, a question.
    start = chat.encode(chat.render(history[0][0], with_image=True)).tolist()
    assert whole[: len(start)] == start
    at = len(start)
    for question, (_, answer) in zip(("Is it red?", "Why?"), history, strict=True):
        follow_up = chat.encode_follow_up(question).tolist()
        found = find(whole, follow_up, at)
        assert found is not None, (whole[at:], follow_up)
        assert chat.decode(whole[at : found - len(follow_up)]).strip() == answer
        at = found
    assert at == len(whole)


def find(ids, part, start):
    """Return where `part` ends in `ids`, the first time after `start`."""
    for at in range(start, len(ids) - len(part) + 1):
        if ids[at : at + len(part)] == part:
            return at + len(part)
    return None


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("text", [
    "USER: <image>\nWhat is it? ASSISTANT: a cat</s>USER: a", "<s>a<image> <|im_end|>\n cat",
    "  two  spaces\n\n</s></s> ▁", ""])  # fmt: skip
def test_aliases_change_no_token(tmp_path, tokenizer, text):
    from transformers import PreTrainedTokenizerFast

    core = TOKENIZERS[tokenizer]()
    chat = make(tmp_path, core, "closed by </s>")
    reference = PreTrainedTokenizerFast(tokenizer_object=core)
    expected = reference(text, add_special_tokens=False)["input_ids"]
    ids = chat.encode(text).tolist()
    assert [3 if i == -200 else i for i in ids] == expected
