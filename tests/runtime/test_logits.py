from __future__ import annotations

import numpy as np
import pytest

from dllava_export.errors import BackendError, InvalidInputError
from dllava_export.runtime.logits import check_finite, penalised, processed, token_logprob

LOGITS = np.array([2, -1, 0.5, 0], np.float32)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "sample 3 at step 7 have 1 NaN and 0 infinite"),
        (np.inf, "sample 3 at step 7 have 0 NaN and 1 infinite"),
        (-np.inf, "sample 3 at step 7 have 0 NaN and 1 infinite"),
    ],
)
def test_logits_that_are_not_finite_are_an_error(value, message):
    check_finite(LOGITS, 3, 7)
    logits = LOGITS.copy()
    logits[2] = value
    with pytest.raises(BackendError, match=message):
        check_finite(logits, 3, 7)


def test_a_penalty_makes_seen_tokens_less_likely():
    seen = np.array([0, -200, 1, 0])
    assert penalised(LOGITS, seen, 2.0).tolist() == [1, -2, 0.5, 0]
    assert LOGITS.tolist() == [2, -1, 0.5, 0]


def test_processors_follow_each_other():
    seen = []

    def writes(logits, token_ids):
        seen.append(token_ids)
        logits[0] = -np.inf

    def returns(logits, token_ids):
        return logits + 1

    changed = processed(LOGITS, [5, 6], [writes, returns])
    assert changed.tolist() == [-np.inf, 0, 1.5, 1]
    assert seen == [[5, 6]]
    assert LOGITS[0] == 2


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (LOGITS[:3], r"float32 of shape \[3\];"),
        (LOGITS.astype(int), r"int64 of shape \[4\];"),
        ("nothing", r"<U7 of shape \[\];"),
        (LOGITS * np.nan, "with NaN, "),
        (LOGITS - np.inf, "with NaN, "),
    ],
)
def test_refuses_what_a_processor_must_not_give(given, found):
    with pytest.raises(InvalidInputError, match=f"Logits processor .* gave .*{found}"):
        processed(LOGITS, [], [lambda logits, token_ids: given])


def test_logarithms_of_probabilities():
    probabilities = np.exp(LOGITS.astype(np.float64))
    probabilities /= probabilities.sum()
    told = token_logprob(LOGITS, 3, 2)
    assert told.token_id == 3
    assert told.logprob == pytest.approx(np.log(probabilities[3]))
    assert told.top == pytest.approx(
        {0: np.log(probabilities[0]), 2: np.log(probabilities[2])}
    )
    assert list(told.top) == [0, 2]
    assert token_logprob(LOGITS, 3, 0).top == {}
