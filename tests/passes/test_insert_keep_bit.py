from __future__ import annotations

import dataclasses

import helpers
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from text_decisions import CONSTANTS, DECISIONS

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.insert_image_selection import InsertImageSelectionPass
from dllava_export.passes.insert_keep_bit import InsertKeepBitPass
from dllava_export.passes.insert_kv_cache import InsertKVCachePass

LAST_ROWS = """
    last_h0 = Slice (kept_h0, last_axis, end, axis_1)
    last_position = Slice (position_ids, last_axis, end, axis_1)
    last_kind = Slice (token_kind, last_axis, end, axis_1)
"""
KEEP = """
    is_generated = Equal (last_kind, three)
    is_rejected = Not (decision)
    dropped = And (is_generated, is_rejected)
    is_dropped = Squeeze (dropped, axis_1)
    keep = Not (is_dropped)
    stored = Where (is_dropped, zero, kept_lengths)
"""


def without_bit(num_layers: int = 2) -> onnx.ModelProto:
    return helpers.apply(
        helpers.dense_decoder(num_layers),
        GatherLastRowPass(),
        InsertKVCachePass(),
        InsertImageSelectionPass("norm", 1),
    )


def keep_bit(policy: str, rate: float = 0.25) -> InsertKeepBitPass:
    return InsertKeepBitPass(policy, rate, helpers.predictor_weights())


def expected(policy: str) -> onnx.ModelProto:
    text = helpers.SparseText(
        cache=True,
        more=LAST_ROWS + DECISIONS[policy] + KEEP,
        stored="stored",
        outputs=", bool[batch] keep",
        constants=CONSTANTS,
    )
    return text.model(helpers.predictor_weights().tensors)


def reference_keep(policy: str, hidden: np.ndarray, position: int, rate: float) -> bool:
    """Return the decision about one generated row [1, 8]."""
    if policy == "random":
        return bool(helpers.hashed(np.array([position]), 1 << 20)[0] < rate)
    if policy == "uniform":
        return int((position + 1) * rate) > int(position * rate)
    return bool(helpers.text_logits(hidden)[0] > 0)


@pytest.mark.parametrize("policy", DECISIONS)
def test_the_sparse_index_depends_on_a_decision(policy: str) -> None:
    after = helpers.apply(without_bit(), keep_bit(policy))
    helpers.assert_same_graph(after, expected(policy))


@pytest.mark.parametrize("policy", DECISIONS)
def test_leaves_a_graph_with_a_keep_bit_alone(policy: str) -> None:
    helpers.assert_changes_nothing(expected(policy), keep_bit(policy))


@pytest.mark.parametrize("policy", DECISIONS)
def test_second_run_changes_nothing(policy: str) -> None:
    after = helpers.apply(without_bit(), keep_bit(policy))
    helpers.assert_changes_nothing(after, keep_bit(policy))


def test_refuses_settings_that_decide_nothing() -> None:
    with pytest.raises(ValueError, match=r"^policy 'norm' has no decision for a single token"):
        InsertKeepBitPass("norm", 0.5)
    with pytest.raises(ValueError, match=r"^keep_rate must be in \(0, 1\), got 1.0"):
        InsertKeepBitPass("random", 1.0)


@pytest.mark.parametrize(
    "passes",
    [
        pytest.param([InsertKVCachePass()], id="no selection"),
        pytest.param([InsertImageSelectionPass("norm", 1)], id="no cache"),
    ],
)
def test_refuses_a_graph_without_sparse_caches(passes: list) -> None:
    model = helpers.apply(helpers.dense_decoder(2), GatherLastRowPass(), *passes)
    with pytest.raises(
        PreconditionError, match=r"^The graph has no input 'write_index_sparse'"
    ):
        helpers.apply(model, keep_bit("random"))


def test_refuses_a_predictor_without_weights() -> None:
    with pytest.raises(PreconditionError, match="The checkpoint has no output_text_predictor"):
        helpers.apply(without_bit(), InsertKeepBitPass("predictor", 0.5))


def test_reports_a_missing_keep_bit() -> None:
    with pytest.raises(PostconditionError, match=r"^The graph has no output 'keep'\.$"):
        keep_bit("random").ensures(graph_from_model(without_bit()))


def test_reports_an_index_that_ignores_the_bit() -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken(InsertKeepBitPass):
        def apply(self, graph: gs.Graph) -> bool:
            super().apply(graph)
            where = next(n for n in graph.nodes if n.outputs[0].name.endswith("num_stored"))
            where.outputs[0].outputs[0].inputs[1] = where.inputs[2]
            return True

    with pytest.raises(PostconditionError, match=r"^next_write_index_sparse ignores the keep"):
        Broken("random", 0.5)(graph_from_model(without_bit()))


@pytest.mark.parametrize("policy", DECISIONS)
def test_prefill_is_not_touched(policy: str) -> None:
    feeds = helpers.prompt([[1, 2, 2, 2, 1], [1, 1]], drop=2) | helpers.empty_caches(2, [9, 9])
    expected = helpers.run(without_bit(), feeds)
    actual = helpers.run(helpers.apply(without_bit(), keep_bit(policy)), feeds)
    assert actual.pop(names.KEEP).tolist() == [True, True]
    for name, values in actual.items():
        assert (values == expected[name]).all()


@pytest.mark.parametrize("policy", DECISIONS)
def test_decode_equals_a_reference_that_forgets_dropped_rows(policy: str) -> None:
    model = helpers.Runner(helpers.apply(without_bit(3), keep_bit(policy, 0.5)))
    kinds, steps = [[1, 1, 1, 1], [1, 1]], 8
    feeds = helpers.prompt(kinds, drop=0) | helpers.empty_caches(2, [14, 14, 14])
    outputs = model(feeds)
    references = [helpers.ReferenceDecoder(3) for _ in kinds]
    for sample, reference in enumerate(references):
        rows = len(kinds[sample])
        reference.feed(feeds[names.INPUTS_EMBEDS][sample, :rows], np.arange(rows))
    bits = []
    for step in range(steps):
        feeds = helpers.generated_row(2, 0, seed=step) | helpers.carried_over(outputs)
        feeds[names.POSITION_IDS] = np.array([[len(sample) + step] for sample in kinds])
        outputs = model(feeds)
        bits.append(outputs[names.KEEP])
        for sample, reference in enumerate(references):
            logits = reference.feed(
                feeds[names.INPUTS_EMBEDS][sample],
                feeds[names.POSITION_IDS][sample],
                sparse_layer=1,
                is_stored=lambda x, p: reference_keep(policy, x, int(p[0]), 0.5),
            )
            helpers.assert_close(outputs[names.LOGITS][sample], logits.astype(np.float32))
            stored = len(reference.caches[1][0])
            assert outputs[names.next_write_index(names.SPARSE)][sample] == stored
            assert (
                outputs[names.next_write_index(names.FULL)][sample]
                == len(kinds[sample]) + step + 1
            )
    assert 0 < np.sum(bits) < 2 * steps


def test_padding_stores_nothing() -> None:
    model = helpers.Runner(helpers.apply(without_bit(), keep_bit("uniform")))
    outputs = model(helpers.prompt([[1, 1], [1, 1]], drop=0) | helpers.empty_caches(2, [9, 9]))
    feeds = helpers.generated_row(2, 2, seed=0) | helpers.carried_over(outputs)
    feeds[names.TOKEN_KIND] = np.array([[names.GENERATED_TEXT], [names.PADDING]])
    feeds[names.KEPT_LENGTHS] = np.array([1, 0])
    outputs = model(feeds)
    assert outputs[names.next_write_index(names.FULL)].tolist() == [3, 2]
    assert outputs[names.next_write_index(names.SPARSE)][1] == 2
    assert outputs[names.KEEP][1]


def test_the_index_stops_at_the_spare_row() -> None:
    model = helpers.Runner(helpers.apply(without_bit(), keep_bit("random", 0.99)))
    outputs = model(helpers.prompt([[1, 1, 1]], drop=0) | helpers.empty_caches(1, [9, 5]))
    for step in range(4):
        feeds = helpers.generated_row(1, 3 + step, seed=step)
        outputs = model(feeds | helpers.carried_over(outputs))
    assert outputs[names.next_write_index(names.SPARSE)].tolist() == [4]
    assert outputs[names.next_write_index(names.FULL)].tolist() == [7]
