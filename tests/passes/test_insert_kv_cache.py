from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest

from dllava_export import names
from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model
from dllava_export.passes.insert_kv_cache import InsertKVCachePass

CAPACITY = 9


def without_cache() -> onnx.ModelProto:
    return helpers.apply(helpers.dense_decoder(2), GatherLastRowPass())


def with_cache() -> onnx.ModelProto:
    return helpers.apply(without_cache(), InsertKVCachePass())


def expected() -> onnx.ModelProto:
    groups = {"write_index": "write_index_full", "lengths": "row_lengths"}
    text = helpers.graph_text(
        f"{helpers.DENSE_INPUTS}, int64[batch, rows] token_kind, int64[batch] write_index_full, "
        + helpers.cache_values("past_key_values", 2),
        f"float[batch, 11] logits, {helpers.cache_values('present', 2)}, "
        "int64[batch] next_write_index_full",
        helpers.ROW_LENGTHS,
        helpers.ROTARY.format(positions="position_ids"),
        helpers.layer_text(0, "inputs_embeds", helpers.CACHED_ATTENTION, **groups),
        helpers.layer_text(1, "h0", helpers.CACHED_ATTENTION, **groups),
        helpers.LAST_ROW.format(x="h1", lengths="row_lengths"),
        helpers.HEAD.format(x="last", logits="row_logits"),
        helpers.SQUEEZE,
        helpers.NEXT_WRITE_INDEX.format(group="full", stored="row_lengths", i=0),
    )
    return helpers.model_from_text(text, helpers.decoder_weights(2))


def start(feeds: dict[str, np.ndarray], capacity: int = CAPACITY) -> dict[str, np.ndarray]:
    batch = len(feeds[names.TOKEN_KIND])
    return feeds | helpers.empty_caches(batch, [capacity, capacity])


def test_every_layer_gets_a_cache() -> None:
    helpers.assert_same_graph(with_cache(), expected())


def test_leaves_a_graph_with_caches_alone() -> None:
    helpers.assert_changes_nothing(expected(), InsertKVCachePass())


def test_second_run_changes_nothing() -> None:
    helpers.assert_changes_nothing(with_cache(), InsertKVCachePass())


def test_refuses_a_graph_that_does_not_count_rows() -> None:
    with pytest.raises(
        PreconditionError, match="no input 'token_kind'; run GatherLastRowPass"
    ):
        helpers.apply(helpers.dense_decoder(2), InsertKVCachePass())


def test_reports_a_layer_without_a_cache() -> None:
    with pytest.raises(PostconditionError, match=r"^Decoder layer 0 has no KV cache\.$"):
        InsertKVCachePass().ensures(graph_from_model(without_cache()))


def test_prefill_equals_the_graph_without_a_cache() -> None:
    feeds = start(helpers.prompt([[1, 2, 2, 1], [1, 1]], drop=0))
    actual = helpers.run(with_cache(), feeds)
    helpers.assert_close(
        actual[names.LOGITS], helpers.run(without_cache(), feeds)[names.LOGITS]
    )
    assert actual[names.next_write_index(names.FULL)].tolist() == [4, 2]


def test_decode_equals_recomputation() -> None:
    model = helpers.Runner(with_cache())
    feeds = start(helpers.prompt([[1, 2, 2, 1], [1, 1]], drop=0))
    outputs = model(feeds)
    references = [helpers.ReferenceDecoder(2) for _ in range(2)]
    for sample, (reference, rows) in enumerate(zip(references, (4, 2), strict=True)):
        reference.feed(feeds[names.INPUTS_EMBEDS][sample, :rows], np.arange(rows))
    for step in range(3):
        feeds = helpers.generated_row(2, 0, seed=step) | helpers.carried_over(outputs)
        feeds[names.POSITION_IDS] = np.array([[4 + step], [2 + step]])
        outputs = model(feeds)
        for sample, reference in enumerate(references):
            row, position = (
                feeds[names.INPUTS_EMBEDS][sample],
                feeds[names.POSITION_IDS][sample],
            )
            logits = reference.feed(row, position).astype(np.float32)
            helpers.assert_close(outputs[names.LOGITS][sample], logits)


def test_a_chunked_prompt_equals_a_whole_one() -> None:
    model = helpers.Runner(with_cache())
    whole = start(helpers.prompt([[1, 2, 2, 1, 1, 1]], drop=0))
    rows = (names.INPUTS_EMBEDS, names.POSITION_IDS, names.TOKEN_KIND)
    first = model(whole | {name: whole[name][:, :4] for name in rows})
    rest = {name: whole[name][:, 4:] for name in rows} | helpers.carried_over(first)
    helpers.assert_close(model(rest)[names.LOGITS], model(whole)[names.LOGITS])


def test_a_rewound_index_overwrites_the_last_row() -> None:
    model = helpers.Runner(with_cache())
    prefill = model(start(helpers.prompt([[1, 1, 1]], drop=0)))
    dropped = model(helpers.generated_row(1, 3, seed=8) | helpers.carried_over(prefill))
    rewound = helpers.carried_over(dropped) | {names.write_index(names.FULL): np.array([3])}
    following = helpers.generated_row(1, 4, seed=9)
    actual = model(following | rewound)[names.LOGITS]
    helpers.assert_close(
        actual, model(following | helpers.carried_over(prefill))[names.LOGITS]
    )


def test_the_spare_row_is_never_counted() -> None:
    model = helpers.Runner(with_cache())
    outputs = model(start(helpers.prompt([[1, 1, 1], [1, 1]], drop=0), capacity=4))
    for _ in range(3):
        outputs = model(helpers.generated_row(2, 3, seed=1) | helpers.carried_over(outputs))
    assert outputs[names.next_write_index(names.FULL)].tolist() == [3, 3]
