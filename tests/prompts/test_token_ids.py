from __future__ import annotations

import numpy as np
import pytest
import torch

from dllava_export.errors import InvalidInputError
from dllava_export.prompts.token_ids import (
    checked_ids,
    checked_mask,
    checked_prompts,
    is_one_row,
    without_padding,
)

IDS = [5, -200, 7]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(IDS, id="list"),
        pytest.param(tuple(IDS), id="tuple"),
        pytest.param(np.array(IDS), id="int64"),
        pytest.param(np.array(IDS, np.int16), id="int16"),
        pytest.param(torch.tensor(IDS), id="tensor"),
        pytest.param([np.int32(5), -200, 7], id="numpy's numbers"),
        pytest.param([torch.tensor(5), torch.tensor(-200), torch.tensor(7)], id="tensors"),
    ],
)
def test_takes_integers_of_every_kind(values):
    ids = checked_ids(values, "ids", num_dims=1)
    assert ids.dtype == np.int64
    assert ids.tolist() == IDS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param([3.9], "ids is float64 of shape \\[1\\], expected integers", id="float"),
        pytest.param([3.0], "ids is float64", id="whole float"),
        pytest.param(["5"], "ids is <U1", id="text"),
        pytest.param("5", "ids is <U1", id="a text"),
        pytest.param([b"5"], r"ids is \|S1", id="bytes"),
        pytest.param([True], "ids is booleans", id="bool"),
        pytest.param([3, True], "ids is booleans", id="bool among numbers"),
        pytest.param([[3], [False]], "ids is booleans", id="deep bool"),
        pytest.param(np.array([True]), "ids is bool", id="bool array"),
        pytest.param([1j], "ids is complex128", id="complex"),
        pytest.param([None], "ids is object", id="None"),
        pytest.param([2**70], "ids is object", id="beyond uint64"),
        pytest.param(
            np.array([3, 2**63], np.uint64), "ids has 9223372036854775808", id="uint64"
        ),
        pytest.param([2**63], "ids has 9223372036854775808", id="beyond int64"),
        pytest.param(np.array([5], "m8[s]"), "ids is timedelta64", id="times"),
        pytest.param([[1, 2], [3]], "ids cannot be read as an array", id="ragged"),
        pytest.param(
            torch.zeros(2, requires_grad=True), "ids cannot be read as an array", id="gradient"
        ),
    ],
)
def test_refuses_what_are_no_integers(values, message):
    with pytest.raises(InvalidInputError, match=message):
        checked_ids(values, "ids")


def test_small_unsigned_numbers_are_ids():
    assert checked_ids(np.array([3], np.uint64), "ids").tolist() == [3]


def test_no_ids_are_ids_of_any_type():
    assert checked_ids([], "ids").dtype == np.int64
    assert checked_ids(np.zeros((2, 0)), "ids").shape == (2, 0)


@pytest.mark.parametrize("values", [[True, False], [1, 0], np.array([1, 0], np.uint8)])
def test_masks_are_booleans_or_0_and_1(values):
    assert checked_mask(values, "mask", (2,)).tolist() == [True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([2, 0], "mask is int64 with values other than 0 and 1"),
        ([1.0, 0.0], "mask is float64"),
        (["yes", ""], "mask is <U3"),
        ([1], r"mask has shape \(1,\), expected \(2,\)"),
    ],
)
def test_refuses_other_masks(values, message):
    with pytest.raises(InvalidInputError, match=message):
        checked_mask(values, "mask", (2,))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, 6], True),
        (np.array([5, 6]), True),
        (torch.tensor([5, 6]), True),
        ([np.int64(5)], True),
        ([[5, 6]], False),
        ([np.array([5])], False),
        (torch.tensor([[5, 6]]), False),
        ([], False),
        ("56", False),
    ],
)
def test_one_dimension_is_one_prompt(values, expected):
    assert is_one_row(values) is expected


@pytest.mark.parametrize(
    "values", [[[5, 6], [7, 8]], np.array([[5, 6], [7, 8]]), torch.tensor([[5, 6], [7, 8]])]
)
def test_two_dimensions_are_several_prompts(values):
    assert [ids.tolist() for ids in checked_prompts(values)] == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (5, "input_ids is int, expected"),
        (None, "input_ids is NoneType, expected"),
        ("56", "input_ids is str, expected"),
        (np.array(5), "input_ids is (a single number|ndarray), expected"),
        ([[5], ["6"]], "Sample 1 of input_ids is <U1"),
        ([[[5]]], r"Sample 0 of input_ids is int64 of shape \[1, 1\], .* one dimension"),
    ],
)
def test_refuses_what_are_no_prompts(values, message):
    with pytest.raises(InvalidInputError, match=message):
        checked_prompts(values)


# Padding.


def unpadded(rows, mask=None, pads=(0,), shared=False):
    prompts = [np.array(row) for row in rows]
    return [ids.tolist() for ids in without_padding(prompts, mask, pads, shared)]


@pytest.mark.parametrize("dtype", [bool, np.int64, np.int32])
def test_a_mask_takes_padding_away_on_either_side(dtype):
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).astype(dtype)
    rows = [[0, 0, 5, 6], [5, 0, 6, 0], [0, 5, 6, 0]]
    assert unpadded(rows, mask) == [[5, 6], [5, 0, 6], [0, 5, 6, 0]]


def test_a_mask_may_be_a_row_of_its_own_for_each_sample():
    assert unpadded([[5, 6, 0], [7]], [[1, 1, 0], [1]]) == [[5, 6], [7]]
    assert unpadded([[5, 6, 0]], [1, 1, 0]) == [[5, 6]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1]], r"Sample 0 of attention_mask has shape \(2,\), expected \(3,\)"),
        ([[1, 1, 1]] * 2, "is for 2 samples, input_ids for 1"),
        ([[0, 0, 0]], "has no 1, expected one for each token"),
        ([[1, 0, 1]], "has a 0 at 1, between ones"),
        ([[1, 2, 1]], "with values other than 0 and 1"),
    ],
)
def test_refuses_masks_that_do_not_fit(mask, message):
    with pytest.raises(InvalidInputError, match=message):
        unpadded([[5, 6, 7]], mask)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 5, 6], "Sample 0 of input_ids begins with 1 times 0"),
        ([5, 0, 0], "Sample 0 of input_ids ends with 2 times 0"),
        ([0, 0], "begins with 2 times 0"),
    ],
)
def test_without_a_mask_padding_is_refused(row, message):
    with pytest.raises(InvalidInputError, match=f"{message}.*Pass attention_mask"):
        unpadded([row])


def test_pad_ids_inside_of_a_prompt_are_tokens():
    assert unpadded([[5, 0, 0, 6]]) == [[5, 0, 0, 6]]


def test_a_pad_id_with_a_meaning_of_its_own_is_padding_where_it_is_repeated():
    # The end of sequence may end a prompt, and begin one where it is the beginning too.
    assert unpadded([[2, 5, 2]], pads=(2,), shared=True) == [[2, 5, 2]]
    with pytest.raises(InvalidInputError, match="ends with 2 times 2"):
        unpadded([[2, 5, 2, 2]], pads=(2,), shared=True)


def test_nothing_is_refused_where_no_pad_id_is_known():
    assert unpadded([[0, 0, 5]], pads=()) == [[0, 0, 5]]
