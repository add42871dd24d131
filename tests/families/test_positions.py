from __future__ import annotations

import numpy as np
import pytest

from dllava_export import names
from dllava_export.families.positions import SequentialPositions

TEXT, IMAGE, PADDING = names.PROMPT_TEXT, names.IMAGE, names.PADDING


@pytest.mark.parametrize(
    ("token_kind", "following"),
    [
        pytest.param([[TEXT, IMAGE, IMAGE, TEXT]], [4], id="image"),
        pytest.param([[TEXT, TEXT, PADDING], [TEXT, IMAGE, IMAGE]], [2, 3], id="padding"),
        pytest.param([[PADDING, PADDING]], [0], id="nothing but padding"),
    ],
)
def test_rows_count_from_zero_and_answers_follow_the_valid_ones(token_kind, following):
    positions, found = SequentialPositions().prompt(np.array(token_kind, np.int64))
    assert positions.tolist() == [list(range(len(token_kind[0])))] * len(token_kind)
    assert found.tolist() == following
    assert positions.dtype == found.dtype == np.int64
