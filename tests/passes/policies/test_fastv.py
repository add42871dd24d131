from __future__ import annotations

import numpy as np
from policy_graphs import (
    PAID_CONSTANTS,
    PAID_NODES,
    PROMPT_ROW_NODES,
    ScoreGraph,
    assert_nodes,
    image_feeds,
)

from dllava_export.geometry import Geometry
from dllava_export.passes.policies.fastv import FastVPolicy

FASTV = FastVPolicy()
SIZES = Geometry(3, 8, 12, 4, 2, 16, 11, num_image_tokens=10)


def test_nodes() -> None:
    assert_nodes(
        "fastv",
        f"""
    {PROMPT_ROW_NODES}
    reader = ReduceMax <keepdims = 1> (prompt_row, axis_1)
    {PAID_NODES}
    scores = Squeeze (paid, axis_1)
""",
        PAID_CONSTANTS,
    )


def test_the_last_prompt_row_alone_is_asked() -> None:
    feeds = image_feeds([[1, 2, 2, 1, 1, 3]])
    before = ScoreGraph(FASTV)(feeds)
    feeds["query"][0, [0, 1, 2, 3, 5]] = 9
    assert ScoreGraph(FASTV)(feeds)[0, 1:3].tolist() == before[0, 1:3].tolist()
    feeds["query"][0, 4] = 9
    assert (ScoreGraph(FASTV)(feeds)[0, 1:3] != before[0, 1:3]).all()


def test_the_key_it_asks_for_scores_highest() -> None:
    feeds = image_feeds([[1, 2, 2, 2, 1]])
    feeds["key"][0, 2] = feeds["query"][0, 4, [*range(8), *range(16, 24)]] * 5
    assert np.argmax(ScoreGraph(FASTV)(feeds)[0, 1:4]) == 1


def test_counts_its_product() -> None:
    assert FASTV.image_flops(SIZES) == 2 * 10 * 4 * 16
