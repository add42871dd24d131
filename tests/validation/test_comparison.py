from __future__ import annotations

import numpy as np
import pytest

from dllava_export.sparsity import Sparsity
from dllava_export.validation.comparison import CompareConversations, Shape
from dllava_export.validation.settings import Tolerances

# Two layers, the second one sparse; rows 1 to 4 of 6 are an image, of which two are kept.
SHAPE = Shape(num_layers=2, num_prompt=6, num_steps=2, image_start=1, num_image=4)
SPARSE = Sparsity(sparse_layer=1, image_keep_rate=0.5, output_text_keep_rate=0.5)
TOLERANCES = Tolerances(rtol=1e-3, atol=1e-3, check_error_stat="elemwise", margin=1e-2)


def outputs(kept=(0, 1, 3, 5), keep=(True, False), **changes):
    """What a run of this conversation gives; every row holds its position."""
    cached = [*kept, *(6 + step for step in range(2) if keep[step])]
    found = {
        "prefill/kept_indices": np.array(kept),
        "prefill/image_scores": np.float32([-1, -3, -2, -3.001]),
        "prefill/cache_lengths": np.array([6, len(kept)]),
        "prefill/logits": np.float32([1, 2, 3]),
        "cache/layers.0/key": rows(range(8)),
        "cache/layers.1/key": rows(cached),
        "prefill/layers.0/hidden_states": rows(range(6)),
        "prefill/layers.1/key": rows(kept),
        "prefill/layers.1/hidden_states": rows(kept),
        "recompute/logits": np.float32([1, 2, 3]),
        "recompute/num_rows": np.array([len(cached)]),
    }
    for step in range(2):
        stored = len(kept) + sum(keep[: step + 1])
        found[f"decode.{step}/keep"] = np.array([keep[step]])
        found[f"decode.{step}/keep_margin"] = np.float32([0.5 if keep[step] else -0.5])
        found[f"decode.{step}/cache_lengths"] = np.array([7 + step, stored])
        found[f"decode.{step}/logits"] = np.float32([1, 2, 3])
    return {**found, **changes}


def rows(positions):
    return np.float32([[position, 1] for position in positions])


def compare(candidate, reference, sparsity=SPARSE, is_dense=False):
    checks = CompareConversations(sparsity, SHAPE, TOLERANCES, is_dense)(candidate, reference)
    return {check.place: check for check in checks.values()}


def mismatches(checks):
    return [place for place, check in checks.items() if not check]


def test_the_same_run_matches_in_the_order_of_computation():
    checks = compare(outputs(), outputs())
    assert {check.verdict for check in checks.values()} == {"match"}
    assert list(checks)[:6] == [
        "prefill/layers.0/hidden_states",
        "prefill/image_scores",
        "prefill/kept_indices",
        "prefill/layers.1/key",
        "prefill/layers.1/hidden_states",
        "prefill/cache_lengths",
    ]


def test_after_a_near_tie_common_rows_are_measured_and_keys_judged():
    # Rows 2 and 4 have the scores -3 and -3.001: each side keeps one of them.
    reference = outputs(kept=(0, 1, 2, 3, 5))
    candidate = outputs(kept=(0, 1, 3, 4, 5))
    checks = compare(candidate, reference, Sparsity(sparse_layer=1, image_keep_rate=0.75))
    assert mismatches(checks) == []
    assert "1 of 3 flips, all at margins under 0.01" in checks["prefill/kept_indices"].detail
    key = checks["prefill/layers.1/key"]
    assert (key.verdict, key.max_abs, key.detail) == ("match", 0, "4 rows in common")
    for place in ("prefill/layers.1/hidden_states", "prefill/logits", "decode.1/logits"):
        assert checks[place].verdict == "drift"
        assert checks[place].detail.endswith("rows differ since prefill/kept_indices")


def test_a_wrong_row_is_the_only_error():
    checks = compare(outputs(kept=(0, 2, 3, 5)), outputs())
    assert mismatches(checks) == ["prefill/kept_indices"]


def test_a_keep_bit_acts_from_the_next_step_on():
    checks = compare(outputs(keep=(False, False)), outputs())
    assert mismatches(checks) == ["decode.0/keep"]
    assert checks["decode.0/logits"].verdict == "match"
    assert checks["decode.1/logits"].verdict == "drift"
    assert checks["recompute/num_rows"].verdict == "drift"


def test_a_bit_that_a_full_cache_forced_is_no_flip():
    candidate = outputs()
    forced = np.array([True])
    candidate |= {
        "decode.0/forced": forced,
        "decode.0/cache_lengths": np.array([7, 4]),
        "decode.1/cache_lengths": np.array([8, 4]),
        "cache/layers.1/key": rows([0, 1, 3, 5]),
    }
    checks = compare(candidate, outputs())
    assert "decode.0/keep" not in mismatches(checks)
    assert "decode.1/cache_lengths" not in mismatches(checks)


def test_cache_lengths_follow_from_decisions():
    changes = {"decode.1/cache_lengths": np.array([8, 6])}
    checks = compare(outputs(**changes), outputs())
    assert mismatches(checks) == ["decode.1/cache_lengths"]
    assert checks["decode.1/cache_lengths"].detail == "[8, 6], expected [8, 5]"


def test_recompute_may_not_keep_other_numbers_of_rows():
    checks = compare(outputs(**{"recompute/num_rows": np.array([6])}), outputs())
    assert mismatches(checks) == ["recompute/num_rows"]
    assert checks["recompute/num_rows"].detail == "6 rows, expected 5"
    assert checks["recompute/logits"].verdict == "drift"


def test_recompute_may_not_keep_other_rows():
    rows_here, rows_there = np.array([0, 1, 3, 5, 6]), np.array([0, 1, 3, 5, 7])
    name = "recompute/kept_rows"
    checks = compare(outputs(**{name: rows_here}), outputs(**{name: rows_there}))
    assert mismatches(checks) == ["recompute/num_rows"]


def test_missing_rows_are_an_error():
    changes = {"prefill/layers.1/key": rows([0, 1, 3])}
    checks = compare(outputs(**changes), outputs())
    assert mismatches(checks) == ["prefill/layers.1/key"]
    assert checks["prefill/layers.1/key"].detail == "3 rows, expected 4"


@pytest.mark.parametrize(
    ("kept", "wrong"), [((0, 1, 3, 5), []), ((0, 1, 5), ["prefill/kept_indices"])]
)
def test_a_dense_reference_judges_numbers_of_rows(kept, wrong):
    dense = outputs(kept=range(6), keep=(True, True))
    checks = compare(outputs(kept=kept), dense, is_dense=True)
    assert mismatches(checks) == wrong
    assert checks["prefill/layers.1/key"].verdict == "match"
    assert checks["prefill/logits"].verdict == "drift"
    assert "decode.0/keep" not in checks


def test_another_token_is_said():
    changes = {"prefill/logits": np.float32([9, 2, 3])}
    check = compare(outputs(**changes), outputs())["prefill/logits"]
    assert check.detail == "token 0, expected 2"
    assert not check
