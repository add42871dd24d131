from __future__ import annotations

import json
import time

import pytest

from dllava_export.errors import BundleError, InvalidInputError, SettingError
from dllava_export.families.chat_templates import (
    TEMPLATES,
    Conversation,
    JinjaTemplate,
    find_template,
    named_templates,
    read_template_file,
)

NAMED = {template.name: template for template in TEMPLATES}
LLAMA_2_SYSTEM = NAMED["llama_2"].system
TALK = Conversation(["What?", "Why?"], ["A cat."], "before")


def jinja(source, **special):
    return JinjaTemplate(source, "a folder", special)


# What LLaVA's llava/conversation.py gives for these turns, the BOS of the tokenizer left out.
EXPECTED = {
    "vicuna_v1": NAMED["vicuna_v1"].system
    + " USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
    "llama_2": f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n<image>\nWhat? [/INST]"
    " A cat. </s><s>[INST] Why? [/INST]",
    "mistral_instruct": "[INST] <image>\nWhat? [/INST] A cat. </s>[INST] Why? [/INST]",
    "chatml": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n"
    "What?<|im_end|><|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhy?<|im_end|>"
    "<|im_start|>assistant\n",
    "plain": "<image>\nWhat?\nA cat.\nWhy?\n",
}


@pytest.mark.parametrize("name", named_templates())
def test_named_templates_are_those_of_llava(name):
    assert NAMED[name].render(TALK) == EXPECTED[name]


@pytest.mark.parametrize("name", named_templates())
def test_a_system_text_replaces_the_template_s_own(name):
    text = NAMED[name].render(Conversation(["What?"], system="Be brief."))
    assert "Be brief." in text
    assert not NAMED[name].system or NAMED[name].system not in text


TRANSFORMERS_TEMPLATES = {
    "llava-hf": "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "macros, namespaces, filters": "{% set ns = namespace(n=0, text='') %}"
    "{%- macro part(c) -%}{% if c.type == 'image' %}<image>{% else %}{{ c.text | trim }}"
    "{% endif %}{%- endmacro %}\n"
    "{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n"
    "{{ loop.index0 % 2 }}/{{ loop.length }}{{ bos_token if loop.first }}"
    "{% for c in m.content %}{{ part(c) ~ '|' ~ loop.last }}{% endfor %}{{ m | tojson }}\n"
    "{% if m.content[0].text is defined and 'y' in m.content[0].text %}{% continue %}{% endif %}"
    "{{ m.role.replace('user', 'U').split('s') | join('-') | upper }}"
    "{{ '%s:%03d' % ('a', ns.n) }}{{ '{0}-{x}'.format(1, x=2) }}{{ 'ab' * 2 }}\n{% endfor %}"
    "{% for k, v in {'a': 1, 'b': [2, (3,)]}.items() %}{{ k }}{{ v }}{% endfor %}"
    "{{ messages | map(attribute='role') | list }}{{ messages[0].content | length }}"
    "{{ range(3) | list }}{% set a, b = 1, 2 %}{{ a + b }}{{ messages[::-1][0].role }}"
    "{% set block %}x{{ ns.n }}{% endset %}{{ block | default('z') }}{{ tools is none }}",
}


@pytest.mark.parametrize("name", TRANSFORMERS_TEMPLATES)
def test_renders_what_transformers_renders(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    source = TRANSFORMERS_TEMPLATES[name]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A ☃ cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    (expected,), _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    conversation = Conversation([" What? ", "Why?"], ["A ☃ cat."], "before")
    assert jinja(source, bos_token="<s>").render(conversation) == expected


GROWS = "{% set ns = namespace(x=X, y=X) %}{% for i in range(99) %}STEP{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{{ 'a' * 10000000000 }}", id="repeated text"),
        pytest.param("{{ [1] * 10000000000 }}", id="repeated list"),
        pytest.param("{{ 9 ** 999999999 }}", id="power"),
        pytest.param("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
                     "{% endfor %}", id="loops"),
        pytest.param("{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
                     id="output"),
        pytest.param("{{ 'a' | center(10000000000) }}", id="filter"),
        pytest.param("{{ 'a'.ljust(10 ** 10) }}", id="method"),
        pytest.param("{{ '%10000000000d' % 1 }}", id="percent"),
        pytest.param("{{ '%10000000000d' | format(1) }}", id="format filter"),
        pytest.param("{{ '{:>10000000000}'.format(1) }}", id="format method"),
        pytest.param("{% set a = 'a' * 9999 %}{{ a.replace('a', a) }}", id="replace"),
        pytest.param("{{ range(99999) | join('a' * 99999) }}", id="join"),
        pytest.param("{{ range(99999) | map('string') | map('center', 99999) | list }}",
                     id="map"),
        pytest.param("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", id="macro"),
        pytest.param(GROWS.replace("X", "'aa'").replace(
            "STEP", "{% set ns.x = ns.x ~ ns.x %}"), id="doubled text"),
        pytest.param(GROWS.replace("X", "[1]").replace(
            "STEP", "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}")
            + "{{ ns.x == ns.y }}", id="doubled lists"),
        pytest.param(GROWS.replace("X", "{}").replace(
            "STEP", "{% set ns.x = dict(a=ns.x, b=ns.x) %}") + "{{ ns.x | tojson }}",
            id="doubled objects"),
        pytest.param("{% for i in range(9999) %}{% set x %}{% for i in range(99) %}"
                     "{{ 'a' * 99999 }}{% endfor %}{% endset %}{% endfor %}", id="block"),
        pytest.param("x" * 300_000, id="source"),
        pytest.param("{{ " + "(" * 10_000 + ")" * 10_000 + " }}", id="nesting"),
    ],
)  # fmt: skip
def test_a_template_without_bounds_is_stopped(source):
    start = time.perf_counter()
    with pytest.raises(BundleError, match=r"a folder cannot be applied: .*--chat-template"):
        jinja(source).render(Conversation(["What?"]))
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ namespace(__class__=1) }}{{ nothing.at.all }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_that_fails_gives_one_kind_of_error(source):
    with pytest.raises(BundleError, match="cannot be applied"):
        jinja(source).render(Conversation(["What?"]))


def test_a_long_conversation_is_within_the_limits():
    turns = 400
    conversation = Conversation(["q" * 500] * (turns + 1), ["a" * 500] * turns, "before")
    text = jinja(TRANSFORMERS_TEMPLATES["llava-hf"]).render(conversation)
    assert text.count("q" * 500) == turns + 1


def test_a_template_that_leaves_out_image_or_system_text():
    source = "{{ messages[-1].content[-1].text }}"
    with pytest.raises(BundleError, match="writes 0 times '<image>', expected 1"):
        jinja(source).render(Conversation(["What?"], image="before"))
    with pytest.raises(InvalidInputError, match="leaves out the system text"):
        jinja(source).render(Conversation(["What?"], system="Be brief."))


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_finds_the_template_of_a_folder(tmp_path):
    assert find_template(tmp_path) is None
    write(tmp_path / "tokenizer_config.json", {"chat_template": "a"})
    assert find_template(tmp_path) == "a"
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "b"}]
    write(tmp_path / "chat_template.json", {"chat_template": named})
    assert find_template(tmp_path) == "b"
    write(tmp_path / "chat_template.jinja", "\ufeffc")
    assert find_template(tmp_path) == "c"


def test_a_file_that_is_no_template(tmp_path):
    with pytest.raises(SettingError, match="is no chat template: expected a file of jinja2"):
        read_template_file(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SettingError, match=r"cannot be read .*expected UTF-8 text"):
        read_template_file(tmp_path / "x")
