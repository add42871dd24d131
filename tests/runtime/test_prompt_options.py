from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dllava_export.errors import InvalidInputError

PICTURE = np.zeros((30, 40, 3), np.uint8)


def test_generate_stream_and_chat_take_the_same_options(bundles):
    session = bundles.session("mha")
    options = {"system": "w9 </s>", "allow_special": True, "max_new_tokens": 6}
    expected = session.tokenizer.render(
        "w5", with_image=True, system="w9 </s>", allow_special=True
    )
    [from_ids] = session.generate(
        images=[PICTURE], input_ids=[session.tokenizer.encode(expected)], max_new_tokens=6
    )
    one = session.generate("w5", image=PICTURE, **options)
    assert one.token_ids == from_ids.token_ids
    assert session.generate(["w5"], [PICTURE], **options)[0].token_ids == from_ids.token_ids
    stream = session.stream("w5", image=PICTURE, **options)
    assert [piece.token_id for piece in stream] == from_ids.token_ids
    talk = session.chat(system="w9 </s>", allow_special=True)
    assert talk.ask("w5", PICTURE, max_new_tokens=6).token_ids == from_ids.token_ids


def test_raw_turns_of_a_chat(bundles):
    session = bundles.session("mha")
    talk = session.chat(raw_prompt=True)
    first = talk.ask("<image> w5 w6", PICTURE, max_new_tokens=3)
    second = talk.ask("w7 w8", max_new_tokens=3)
    fed = len(first.token_ids) - first.num_fed_tokens
    assert second.num_prompt_tokens == fed + 2


@pytest.mark.parametrize(
    "images",
    ["cat.png", b"GIF89a", Image.new("RGB", (4, 4)), PICTURE, 7],
    ids=lambda images: type(images).__name__,
)
def test_one_picture_where_a_list_is_expected(bundles, images):
    message = r"images is one .*, expected a list with a picture.*image=picture"
    with pytest.raises(InvalidInputError, match=message) as caught:
        bundles.session("mha").generate(["w5"], images)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        pytest.param([None], "Prompt 0 is NoneType, expected text", id="none"),
        pytest.param(["a\udc80"], "half of a surrogate pair", id="lone surrogate"),
        pytest.param(Image.new("RGB", (4, 4)), "prompts is Image, expected", id="picture"),
        pytest.param(b"w5", "prompts is bytes, expected", id="bytes"),
        pytest.param(None, "Give either prompts or input_ids", id="nothing"),
    ],
)
def test_prompts_that_are_no_text(bundles, prompts, message):
    with pytest.raises(InvalidInputError, match=message):
        bundles.session("mha").generate(prompts)
