from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from places import ROOT

from dllava_export import cli

CAT = str(ROOT / "examples" / "cat.png")


def invoke(*arguments: object, **settings: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], **settings)


def answer(bundle, *arguments):
    result = invoke("run", bundle, "--max-new-tokens", 4, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "x", "--prompt", "w5"],
        ["chat", "x"],
        ["visualize", "x", "--prompt", "w5", "-o", "x.png"],
        ["validate", "x", "--prompt", "w5"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_second_picture_is_refused(arguments):
    result = invoke(*arguments, "--image", "a.png", "--image", "b.png")
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert "2 pictures were given (a.png, b.png), expected one" in message


def test_raw_prompt_and_system(bundles):
    bundle = bundles.path("mha")
    plain = answer(bundle, "--image", CAT, "--prompt", "w5 w6")
    from_example = answer(bundle, "--image", CAT, "--prompt", "<image>\nw5 w6")
    assert plain["token_ids"] == from_example["token_ids"]
    raw = answer(bundle, "--image", CAT, "--prompt", "<image> w5 w6", "--raw-prompt")
    assert raw["num_prompt_tokens"] == raw["num_image_tokens"] + 3  # BOS and two words
    system = answer(bundle, "--image", "none", "--prompt", "w5", "--system", "w7")
    without = answer(bundle, "--image", "none", "--prompt", "w5", "--system", "")
    assert system["num_prompt_tokens"] == without["num_prompt_tokens"] + 1


def test_allow_special(bundles, caplog):
    arguments = [
        bundles.path("mha"),
        "--image",
        "none",
        "--raw-prompt",
        "--prompt",
        "w5</s>w6",
    ]
    assert answer(*arguments, "--allow-special")["num_prompt_tokens"] == 4
    assert answer(*arguments)["num_prompt_tokens"] > 4
    assert "holds '</s>', which is encoded as text" in caplog.text


def test_options_of_text_with_token_ids(bundles):
    result = invoke(
        "run", bundles.path("mha"), "--image", "none", "--input-ids", "1,5", "--system", "w5"
    )
    assert result.exit_code == 1
    assert "say how text becomes token ids, and token ids were given" in result.stderr


def test_chat_keeps_its_options_when_it_starts_anew(bundles):
    arguments = ["--raw-prompt", "--max-new-tokens", 2, "--image", CAT]
    result = invoke(
        "chat", bundles.path("mha"), *arguments, input="<image> w5\nw6\n/new\nw5\n"
    )
    assert result.exit_code == 0, result.output
    result = invoke("chat", bundles.path("mha"), *arguments, input="w5\n")
    assert "expected it once, where the image belongs" in result.stderr
