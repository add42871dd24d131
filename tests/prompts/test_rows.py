from __future__ import annotations

import numpy as np
import pytest

from dllava_export import names
from dllava_export.errors import InvalidInputError
from dllava_export.families.positions import SequentialPositions
from dllava_export.prompts.rows import assemble_prompt

HIDDEN = 4
POSITIONS = SequentialPositions()
TEXT, IMAGE, GENERATED, PAD = (
    names.PROMPT_TEXT,
    names.IMAGE,
    names.GENERATED_TEXT,
    names.PADDING,
)


def lookup(ids):
    """Rows that say which id they stand for."""
    return np.repeat(np.asarray(ids, np.float32)[:, None], HIDDEN, axis=1)


def features(num_images=1, num_rows=2):
    """Rows 1000, 1001, ... of image 0, 2000, ... of image 1."""
    numbers = 1000 * np.arange(1, num_images + 1)[:, None] + np.arange(num_rows)
    return np.repeat(numbers[:, :, None], HIDDEN, axis=2).astype(np.float32)


def assemble(prompts, image_features=None, outputs=None):
    arrays = [np.array(ids, np.int64) for ids in prompts]
    return assemble_prompt(arrays, image_features, lookup, POSITIONS, outputs=outputs)


@pytest.mark.parametrize(
    ("ids", "values", "kinds", "start"),
    [
        pytest.param([3, 4], [3, 4], [TEXT] * 2, 0, id="text"),
        pytest.param([-200, 5], [1000, 1001, 5], [IMAGE, IMAGE, TEXT], 0, id="image first"),
        pytest.param(
            [3, -200, 5], [3, 1000, 1001, 5], [TEXT, IMAGE, IMAGE, TEXT], 1, id="in between"
        ),
        pytest.param([3, -200], [3, 1000, 1001], [TEXT, IMAGE, IMAGE], 1, id="image last"),
        pytest.param([-200], [1000, 1001], [IMAGE, IMAGE], 0, id="image alone"),
    ],
)
def test_features_stand_in_the_placeholder_s_place(ids, values, kinds, start):
    rows = assemble([ids], features() if -200 in ids else None)
    assert rows.inputs_embeds[0, :, 0].tolist() == values
    assert (rows.inputs_embeds == rows.inputs_embeds[:, :, :1]).all()
    assert rows.token_kind.tolist() == [kinds]
    assert rows.position_ids.tolist() == [list(range(len(kinds)))]
    assert rows.lengths.tolist() == [len(kinds)]
    assert rows.num_image.tolist() == [kinds.count(IMAGE)]
    assert rows.image_start.tolist() == [start]


def test_samples_are_padded_on_the_right():
    rows = assemble([[3], [4, -200], [5, 6]], features())
    assert rows.inputs_embeds[:, :, 0].tolist() == [[3, 0, 0], [4, 1000, 1001], [5, 6, 0]]
    assert rows.token_kind.tolist() == [
        [TEXT, PAD, PAD],
        [TEXT, IMAGE, IMAGE],
        [TEXT, TEXT, PAD],
    ]
    assert rows.position_ids.tolist() == [[0, 1, 2]] * 3
    assert rows.lengths.tolist() == [1, 3, 2]
    assert rows.num_image.tolist() == [0, 2, 0]


def test_images_go_to_placeholders_in_order():
    rows = assemble([[-200], [3], [4, -200]], features(2))
    assert rows.inputs_embeds[:, :, 0].tolist() == [
        [1000, 1001, 0],
        [3, 0, 0],
        [4, 2000, 2001],
    ]
    assert rows.image_start.tolist() == [0, 0, 1]


def test_generated_tokens_follow_the_prompt():
    rows = assemble([[3, 4], [-200, 5]], features(), np.array([[7, 8], [9, 10]]))
    assert rows.inputs_embeds[:, :, 0].tolist() == [[3, 4, 7, 8, 0], [1000, 1001, 5, 9, 10]]
    assert rows.token_kind.tolist() == [
        [TEXT, TEXT, GENERATED, GENERATED, PAD],
        [IMAGE, IMAGE, TEXT, GENERATED, GENERATED],
    ]
    assert rows.lengths.tolist() == [4, 5]


def test_no_generated_tokens_change_nothing():
    with_none = assemble([[3, 4]], outputs=np.zeros((1, 0), np.int64))
    assert with_none.token_kind.tolist() == assemble([[3, 4]]).token_kind.tolist()


def test_features_take_the_embeddings_type():
    ids = [np.array([3, -200])]
    rows = assemble_prompt(ids, features(), lambda x: lookup(x).astype(np.float16), POSITIONS)
    assert rows.inputs_embeds.dtype == np.float16


def test_index_arrays_are_int64():
    rows = assemble([[3, -200]], features())
    arrays = (
        rows.token_kind,
        rows.position_ids,
        rows.lengths,
        rows.num_image,
        rows.image_start,
    )
    assert {array.dtype.name for array in arrays} == {"int64"}


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        pytest.param(
            [[-200], [-200]],
            features(1),
            "2 of 2 prompts .* but 1 images",
            id="too few images",
        ),
        pytest.param(
            [[-200], [3]], features(2), "1 of 2 prompts .* but 2 images", id="too many images"
        ),
        pytest.param([[-200]], None, "1 of 1 prompts .* but 0 images", id="no image"),
        pytest.param(
            [[3]], features(1), "0 of 1 prompts .* but 1 images", id="no placeholder"
        ),
    ],
)
def test_refuses_images_that_do_not_match_placeholders(prompts, images, message):
    with pytest.raises(InvalidInputError, match=f"{message} were given. Give one image"):
        assemble(prompts, images)
