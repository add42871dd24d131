from __future__ import annotations

import pytest

from dllava_export.backends.trt.build.profile_shapes import (
    ProfileSizes,
    ShapeOverrides,
    parse_shapes,
    profile_shapes,
)
from dllava_export.backends.trt.engine_config import ProfileShapes

INPUTS = [
    {"name": "inputs_embeds", "shape": ["batch", "rows", 64]},
    {"name": "position_ids", "shape": ["batch", "rows"]},
    {"name": "past_key_values.0.key", "shape": ["batch", 4, "capacity_full", 16]},
    {"name": "num_kept", "shape": [1]},
    {"name": "num_image_rows", "shape": [1]},
]
CAPACITIES = {"capacity_full": 128, "capacity_sparse": 96}
PREFILL = ProfileSizes((1, 1, 2), (1, 50, 100), (1, 30, 80), (0, 36, 36))
DECODE = ProfileSizes((1, 1, 2), (1, 1, 1), (1, 1, 1), (0, 0, 0), has_fixed_rows=True)


def shapes(sizes=PREFILL, **overrides):
    return profile_shapes("prefill", INPUTS, sizes, CAPACITIES, ShapeOverrides(**overrides))


def test_ranges_of_all_inputs():
    assert shapes() == {
        "inputs_embeds": ProfileShapes((1, 1, 64), (1, 50, 64), (2, 100, 64)),
        "position_ids": ProfileShapes((1, 1), (1, 50), (2, 100)),
        "past_key_values.0.key": ProfileShapes(
            (1, 4, 128, 16), (1, 4, 128, 16), (2, 4, 128, 16)
        ),
        "num_kept": ProfileShapes((1,), (30,), (80,), is_values=True),
        "num_image_rows": ProfileShapes((0,), (36,), (36,), is_values=True),
    }


def test_override_reaches_all_inputs_of_the_same_size():
    found = shapes(opt={"inputs_embeds": (2, 60, 64)})
    assert found["position_ids"].opt == (2, 60)
    assert found["past_key_values.0.key"].opt == (2, 4, 128, 16)


def test_override_of_values():
    assert shapes(opt={"num_kept": (44,)})["num_kept"].opt == (44,)


def test_selected_rows_follow_fewer_rows():
    found = shapes(opt={"position_ids": (1, 20)})
    assert (found["num_kept"].opt, found["num_image_rows"].opt) == ((20,), (20,))


def test_decode_takes_only_the_batch_of_an_override():
    found = shapes(DECODE, opt={"position_ids": (2, 20)})
    assert found["position_ids"].opt == (2, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"opt": {"position_ids": (1, 20, 3)}}, "got the shape 1x20x3; expected batchxrows"),
        (
            {"opt": {"inputs_embeds": (1, 20, 32)}},
            "'inputs_embeds' got 32 for axis 2; the engine has batchxrowsx64",
        ),
        (
            {"max": {"past_key_values.0.key": (1, 4, 64, 16)}},
            "got 64 for axis 2; the engine has batchx4x128x16",
        ),
        (
            {"opt": {"position_ids": (1, 20), "inputs_embeds": (1, 30, 64)}},
            "--opt-shapes give rows as 30 for 'inputs_embeds' and as 20 for 'position_ids'",
        ),
        ({"min": {"position_ids": (1, 60)}}, "rows has min 60, opt 50, max 100"),
        (
            {"max": {"position_ids": (2, 101)}},
            "rows as 101, expected at most 100. Raise --max-in",
        ),
        (
            {"max": {"position_ids": (3, 90)}},
            "batch as 3, expected at most 2. Raise --max-batch",
        ),
        (
            {"opt": {"num_kept": (60,), "position_ids": (1, 50)}},
            "num_kept is 60 at opt, where only 50 rows are fed",
        ),
        (
            {
                "opt": {"position_ids": (1, 20), "num_image_rows": (20,)},
                "max": {"position_ids": (1, 30)},
            },
            "num_image_rows is 36 at max, where only 30 rows are fed",
        ),
    ],
)
def test_refuses(overrides, message):
    with pytest.raises(ValueError, match=f"Profile 'prefill': .*{message}"):
        shapes(**overrides)


def test_reads_shapes_as_trtexec_spells_them():
    expected = {"a": (1, 2, 3), "past.0.key": (4,)}
    assert parse_shapes("a:1x2x3, past.0.key:4") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1x", "not readable at 'a:1x'; expected NAME:1x2x3"),
        ("a", "not readable at 'a'"),
        ("a:1,a:2", "name 'a' twice"),
        ("", "not readable at ''"),
    ],
)
def test_refuses_other_spellings(text, message):
    with pytest.raises(ValueError, match=message):
        parse_shapes(text)
