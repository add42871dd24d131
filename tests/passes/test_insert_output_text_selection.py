from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest
from text_decisions import CONSTANTS, DECISIONS

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.insert_image_selection import InsertImageSelectionPass
from dllava_export.passes.insert_kv_cache import InsertKVCachePass
from dllava_export.passes.insert_output_text_selection import InsertOutputTextSelectionPass

CANDIDATES = """
    positions = ai.dllava.GatherTokens (position_ids, kept_indices)
    kinds = ai.dllava.GatherTokens (token_kind, kept_indices)
    count = Shape <start = 1, end = 2> (kinds)
    limit = Reshape (count, scalar_shape)
    slots = Range (zero, limit, one)
    lengths = Unsqueeze (kept_lengths, axis_1)
    last_slot = Sub (lengths, one)
    is_before_last = Less (slots, last_slot)
    is_generated = Equal (kinds, three)
    is_candidate = And (is_generated, is_before_last)
    is_valid_slot = Less (slots, lengths)
    fixed = Where (is_valid_slot, one, zero)
    ranked = Where (is_candidate, two, fixed)
"""
COUNT = """
    is_rejected = Not (decision)
    is_dropped = And (is_candidate, is_rejected)
    counted_dropped = Cast <to = 7> (is_dropped)
    num_dropped = ReduceSum <keepdims = 0> (counted_dropped, axis_1)
    num_rows = Sub (kept_lengths, num_dropped)
    longest = ReduceMax <keepdims = 1> (num_rows, axis_0)
    kept_rows = ai.dllava.SelectTokens (scores_text, ranked, longest, num_rows)
    left_h0 = ai.dllava.GatherTokens (kept_h0, kept_rows)
    left_cos = ai.dllava.GatherTokens (kept_cos, kept_rows)
    left_sin = ai.dllava.GatherTokens (kept_sin, kept_rows)
"""


def without_selection(num_layers: int = 2) -> onnx.ModelProto:
    decoder = helpers.dense_decoder(num_layers)
    return helpers.apply(decoder, GatherLastRowPass(), InsertImageSelectionPass("norm", 1))


def selection(policy: str, rate: float = 0.25) -> InsertOutputTextSelectionPass:
    return InsertOutputTextSelectionPass(policy, rate, helpers.predictor_weights())


def expected(policy: str) -> onnx.ModelProto:
    decision = (
        DECISIONS[policy].replace("last_h0", "kept_h0").replace("last_position", "positions")
    )
    text = helpers.SparseText(
        cache=False,
        more=CANDIDATES + decision + COUNT,
        rows="left_",
        lengths="num_rows",
        outputs=", int64[batch] num_rows",
        constants=CONSTANTS + ", int64[0] scalar_shape = {}",
    )
    return text.model(helpers.predictor_weights().tensors)


def decisions(
    policy: str, hidden: np.ndarray, positions: np.ndarray, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and keep of generated rows [n, 8] at some positions."""
    if policy == "predictor":
        logits = helpers.text_logits(hidden)
        return helpers.text_scores(hidden), logits > 0
    if policy == "random":
        scores = np.float32(rate) - helpers.hashed(positions, 1 << 20)
    else:
        scores = (((positions + 1) * rate).astype(int) - (positions * rate).astype(int)) * 1.0
    return scores, scores > 0


def reference_rows(
    policy: str, hidden: np.ndarray, positions: np.ndarray, kinds: list[int], rate: float
) -> list[int]:
    """Return the rows that go on: as many generated ones as are decided for, the best-scoring."""
    candidates = np.flatnonzero(np.array(kinds[:-1]) == names.GENERATED_TEXT)
    others = sorted({*range(len(kinds))} - {*candidates.tolist()})
    scores, keep = decisions(policy, hidden[candidates], positions[candidates], rate)
    best = candidates[np.argsort(-scores, kind="stable")[: keep.sum()]]
    return sorted([*others, *best.tolist()])


@pytest.mark.parametrize("policy", DECISIONS)
def test_selects_generated_rows_after_the_image_selection(policy: str) -> None:
    after = helpers.apply(without_selection(), selection(policy))
    helpers.assert_same_graph(after, expected(policy))


@pytest.mark.parametrize("policy", DECISIONS)
def test_leaves_a_graph_with_a_selection_alone(policy: str) -> None:
    after = helpers.apply(without_selection(), selection(policy))
    helpers.assert_changes_nothing(after, selection(policy))


def test_second_run_changes_nothing() -> None:
    graph = graph_from_model(without_selection())
    assert selection("random")(graph) is True
    assert selection("random")(graph) is False


def test_refuses_settings_that_decide_nothing() -> None:
    with pytest.raises(ValueError, match=r"^policy 'norm' has no decision for a single token"):
        InsertOutputTextSelectionPass("norm", 0.5)
    with pytest.raises(ValueError, match=r"^keep_rate must be in \(0, 1\), got 0"):
        InsertOutputTextSelectionPass("random", 0)


def test_refuses_a_graph_without_an_image_selection() -> None:
    model = helpers.apply(helpers.dense_decoder(2), GatherLastRowPass())
    with pytest.raises(PreconditionError, match=r"^The graph has no image selection; insert"):
        helpers.apply(model, selection("random"))


def test_refuses_a_graph_with_a_cache() -> None:
    passes = [GatherLastRowPass(), InsertKVCachePass(), InsertImageSelectionPass("norm", 1)]
    model = helpers.apply(helpers.dense_decoder(2), *passes)
    with pytest.raises(PreconditionError, match=r"^The graph has a KV cache; generated rows"):
        helpers.apply(model, selection("random"))


def test_reports_a_selection_that_is_missing() -> None:
    with pytest.raises(PostconditionError, match=r"^The graph has no output 'num_rows'\.$"):
        selection("random").ensures(graph_from_model(without_selection()))


@pytest.mark.parametrize("policy", DECISIONS)
def test_a_prompt_is_not_touched(policy: str) -> None:
    feeds = helpers.prompt([[1, 2, 2, 1, 3], [1, 1]], drop=1)
    expected = helpers.run(without_selection(), feeds)
    actual = helpers.run(helpers.apply(without_selection(), selection(policy)), feeds)
    helpers.assert_close(actual[names.LOGITS], expected[names.LOGITS])
    assert actual[names.NUM_ROWS].tolist() == [4, 2]


@pytest.mark.parametrize("policy", DECISIONS)
@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_equals_the_reference_with_fewer_rows(policy: str, rate: float) -> None:
    model = helpers.apply(without_selection(3), selection(policy, rate))
    kinds = [[1, 2, 2, 2, 1, *[3] * 9], [1, 1, *[3] * 6], [1, 1, 3], [1, 3, 3]]
    feeds = helpers.prompt(kinds, drop=2)
    outputs = helpers.run(model, feeds)
    image = helpers.run(without_selection(3), feeds)[names.KEPT_INDICES]
    for sample, row_kinds in enumerate(kinds):
        kept = image[sample, : feeds[names.KEPT_LENGTHS][sample]]
        chosen: list[int] = []

        def select(
            hidden: np.ndarray, positions: np.ndarray, kept=kept, kinds=row_kinds, c=chosen
        ) -> np.ndarray:
            left = [kinds[row] for row in kept]
            c += reference_rows(policy, hidden[kept], positions[kept], left, rate)
            return kept[c]

        rows = feeds[names.INPUTS_EMBEDS][sample, : len(row_kinds)]
        decoder = helpers.ReferenceDecoder(3)
        logits = decoder.feed(rows, np.arange(len(rows)), 1, select)
        assert outputs[names.NUM_ROWS][sample] == len(chosen)
        helpers.assert_close(outputs[names.LOGITS][sample], logits.astype(np.float32))


@pytest.mark.parametrize("policy", DECISIONS)
def test_prompt_rows_and_the_last_row_always_stay(policy: str) -> None:
    feeds = helpers.prompt([[1, 2, 1, *[3] * 12]], drop=0)
    num_rows = helpers.run(helpers.apply(without_selection(), selection(policy, 0.01)), feeds)
    assert num_rows[names.NUM_ROWS][0] >= 4
