"""Numbers of the wrong kind are refused wherever a session takes numbers."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from dllava_export.backends.kv_plan import SPARE_ROWS
from dllava_export.backends.ort.backend import OrtBackend
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import CapacityError, InvalidInputError, SettingError
from dllava_export.runtime.session import Session

IDS = np.arange(3, 9)
IMAGE_IDS = np.array([1, 5, -200, 9])
PIXELS = np.random.default_rng(0).normal(size=(1, 3, 84, 84)).astype(np.float32)

NO_IDS = [
    pytest.param([3.9], "float64", id="float"),
    pytest.param(["5"], "<U1", id="text"),
    pytest.param([True], "booleans", id="bool"),
    pytest.param(np.array([2**63], np.uint64), "9223372036854775808", id="uint64"),
    pytest.param(None, "object", id="None"),
]
ID_TAKERS = [
    pytest.param(lambda s, ids: s.decode(ids), id="decode"),
    pytest.param(lambda s, ids: s.extend([ids]), id="extend"),
    pytest.param(lambda s, ids: s.embed(ids), id="embed"),
    pytest.param(lambda s, ids: s.prefill([ids]), id="prefill"),
    pytest.param(lambda s, ids: s.recompute([ids]), id="recompute"),
    pytest.param(lambda s, ids: s.recompute([IDS], output_ids=[ids]), id="output ids"),
    pytest.param(lambda s, ids: s.generate(input_ids=[ids]), id="generate"),
]


@pytest.mark.parametrize(("ids", "found"), NO_IDS)
@pytest.mark.parametrize("call", ID_TAKERS)
def test_refuses_what_are_no_token_ids(bundles, call, ids, found):
    session = bundles.session("mha")
    session.prefill([IDS])
    lengths = session.cache_lengths
    with pytest.raises(InvalidInputError, match=found):
        call(session, ids)
    assert session.cache_lengths.tolist() == lengths.tolist()


def test_decode_takes_tensors_and_small_types(bundles):
    session = bundles.session("mha")
    logits = []
    for ids in ([5], torch.tensor([5]), np.array([5], np.uint8)):
        session.prefill([IDS])
        logits.append(session.decode(ids).logits)
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (["yes", ""], "active is <U3"),
        ([0.5, 1.0], "active is float64"),
        ([2, 0], "active is int64 with values other than 0 and 1"),
        ([np.nan, 1], "active is float64"),
    ],
)
def test_active_is_one_or_the_other(bundles, active, message):
    session = bundles.session("mha")
    session.prefill([IDS, IDS])
    with pytest.raises(InvalidInputError, match=message):
        session.decode([5, 6], active=active)
    session.decode([5, 6], active=[1, 0])
    assert session.cache_lengths[0].tolist() == [7, 6]


def nan(values):
    values = values.copy()
    values.flat[7] = np.nan
    return values


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(lambda v: np.zeros(v.shape, np.uint8), "uint8", id="uint8"),
        pytest.param(lambda v: np.zeros(v.shape, np.int64), "int64", id="int64"),
        pytest.param(lambda v: np.zeros(v.shape, bool), "bool", id="bool"),
        pytest.param(lambda v: v.astype(np.complex64), "complex64", id="complex"),
        pytest.param(nan, "1 values that are not finite", id="NaN"),
        pytest.param(lambda v: v / 0.0, "not finite", id="infinite"),
        pytest.param(lambda v: v.astype(np.float64) * 1e60, "not finite", id="too large"),
        pytest.param(lambda v: v.astype(str), "<U", id="text"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("method", ["prefill", "recompute", "encode_images", "features"])
def test_refuses_what_are_no_pixels_or_features(bundles, method, change, found):
    session = bundles.session("mha")
    what = "image_features" if method == "features" else "pixel_values"
    with pytest.raises(InvalidInputError, match=f"{what} .*{found}"):
        if method == "encode_images":
            session.encode_images(change(PIXELS))
        elif method == "features":
            features = session.encode_images(PIXELS)
            session.prefill([IMAGE_IDS], image_features=change(features))
        else:
            getattr(session, method)([IMAGE_IDS], change(PIXELS))


def test_values_that_fp16_cannot_hold_are_refused(bundles):
    session = bundles.session("mha", "fp16")
    features = session.encode_images(PIXELS).astype(np.float32)
    features[0, 3, 5] = 1e6
    with pytest.raises(InvalidInputError, match=r"finite in float16, .* at \[0, 3, 5\]"):
        session.prefill([IMAGE_IDS], image_features=features)


def test_pixels_and_features_exclude_each_other(bundles):
    session = bundles.session("mha")
    features = session.encode_images(PIXELS)
    with pytest.raises(InvalidInputError, match="pixel_values and image_features were both"):
        session.prefill([IMAGE_IDS], PIXELS, image_features=features)


def test_pixels_may_be_tensors(bundles):
    session = bundles.session("mha")
    expected = session.prefill([IMAGE_IDS], PIXELS).logits
    found = session.prefill([IMAGE_IDS], torch.from_numpy(PIXELS)).logits
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("value", [2.5, True, "3"])
def test_counts_are_whole_numbers(bundles, value):
    session = bundles.session("mha")
    with pytest.raises(SettingError, match="max_new_tokens must be a whole number"):
        session.prefill([IDS], max_new_tokens=value)
    session.prefill([IDS])
    with pytest.raises(SettingError, match="num_tokens must be a whole number"):
        session.fill(value)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda lengths: lengths + 1, id="beyond"),
        pytest.param(lambda lengths: lengths - 100, id="negative"),
        pytest.param(lambda lengths: lengths[:1], id="shape"),
        pytest.param(lambda lengths: lengths - 0.5, id="fractions"),
    ],
)
def test_rewind_takes_earlier_lengths_only(bundles, change):
    session = bundles.session("mha")
    session.prefill([IDS])
    lengths = session.cache_lengths
    with pytest.raises(InvalidInputError, match="cache_lengths"):
        session.rewind(change(lengths))
    assert session.cache_lengths.tolist() == lengths.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["prefill", "recompute"])
def test_a_mask_takes_the_padding_away(bundles, method, side):
    session = bundles.session("mha")
    expected = getattr(session, method)([IDS, IDS[:3]]).logits
    ids, mask = np.zeros((2, 9), np.int64), np.zeros((2, 9), bool)
    for row, length in enumerate((6, 3)):
        place = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = IDS[:length], True
    found = getattr(session, method)(ids, attention_mask=mask).logits
    assert np.array_equal(found, expected)


def test_a_further_prompt_may_be_padded_too(bundles):
    session = bundles.session("mha")
    session.prefill([IDS])
    expected = session.extend([[5, 6]]).logits
    session.prefill([IDS])
    found = session.extend([[0, 5, 6]], attention_mask=[[0, 1, 1]]).logits
    assert np.array_equal(found, expected)


# What a prompt's own text begins or ends with is never padding.


@pytest.mark.parametrize("pad", ["<unk>", "</s>", "<s>", "<pad>"])
def test_text_prompts_are_never_taken_for_padded(bundles, tmp_path, pad):
    session = with_pad(bundles, tmp_path, pad)
    text = "no word of the vocabulary at all"  # each becomes the unknown word
    ids = session.tokenizer.encode(text)
    assert ids[-2:].tolist() == [0, 0]
    assert session.generate(text, image=None, max_new_tokens=2).token_ids is not None


@pytest.mark.parametrize(
    ("pad", "ids", "is_refused"),
    [
        ("<unk>", [5, 6, 0], False),
        ("<unk>", [5, 6, 0, 0], True),
        ("</s>", [1, 5, 6, 2], False),
        ("</s>", [2, 2, 5, 6], True),
        ("<s>", [1, 5, 6], False),
        ("<s>", [1, 1, 5, 6], True),
        ("w130", [5, 6, 130], True),
        ("w130", [5, 6, 0, 0], False),
    ],
)
def test_a_pad_id_with_another_meaning_may_stand_at_an_end(
    bundles, tmp_path, pad, ids, is_refused
):
    session = with_pad(bundles, tmp_path, pad)
    if not is_refused:
        session.prefill([ids])
        return
    with pytest.raises(InvalidInputError, match="the id that stands for padding"):
        session.prefill([ids])
    session.prefill([ids], attention_mask=[[1] * len(ids)])


def with_pad(bundles, tmp_path, pad):
    """A session over a bundle whose tokenizer has a pad token."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.path("mha"), folder)
    config = folder / "llm" / "tokenizer_config.json"
    text = config.read_text().replace(
        "{", f'{{"unk_token": "<unk>", "pad_token": "{pad}", ', 1
    )
    config.write_text(text)
    manifest = read_manifest(bundles.path("mha"), verify=False)
    return Session(folder, manifest, OrtBackend(folder, manifest, num_threads=1), 512)


# Backends whose buffers cannot grow.


class FixedBackend(OrtBackend):
    """Has more rows than are asked for, and never more."""

    max_length = 512

    def allocate(self, plan):
        super().allocate(plan.with_rows("sparse", 100))

    def grow(self, plan):
        raise CapacityError("It cannot grow.")


def test_a_further_prompt_fits_what_a_backend_has(bundles):
    folder = bundles.path("mha", output_text_keep_rate=0.01)
    manifest = read_manifest(folder, verify=False)
    backend = FixedBackend(folder, manifest, num_threads=1)
    session = Session(folder, manifest, backend, 512)
    session.prefill([IDS], max_new_tokens=300)
    assert session.kv_plan.capacities["sparse"] == 100 + SPARE_ROWS
    session.extend([np.tile(IDS, 12)])  # 78 rows, beyond the 73 that were planned
    for token in range(3, 60):
        session.decode([token])
    assert session.cache_lengths[3, 0] <= 100
    with pytest.raises(CapacityError, match="It cannot grow"):
        session.extend([np.tile(IDS, 12)])


def test_an_overflow_of_a_finished_sample_is_no_error(bundles):
    session = bundles.fresh_session("mha")
    session.manifest = dataclasses.replace(
        session.manifest, chat_template=None, eos_token_ids=()
    )
    num_steps = []

    class Overflowing(Session):
        def decode(self, token_ids, *, active=None):
            step = super().decode(token_ids, active=active)
            num_steps.append(active.tolist())
            logits = np.where(np.asarray(active)[:, None], step.logits, np.nan)
            return dataclasses.replace(step, logits=logits)

    session.__class__ = Overflowing
    # The first one has room for two tokens more.
    answers = session.generate(input_ids=[np.tile(IDS, 85), IDS], max_new_tokens=6)
    assert [len(answer.token_ids) for answer in answers] == [3, 6]
    assert [False, True] in num_steps
