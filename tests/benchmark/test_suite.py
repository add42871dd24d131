from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_suite import SETTINGS, TINY

from dllava_export.benchmark import suite
from dllava_export.benchmark.geometries import SuiteCase
from dllava_export.benchmark.results import SuiteReport
from dllava_export.benchmark.subject import DENSE, SPARSE
from dllava_export.errors import BackendError

pytestmark = pytest.mark.slow

MISSING = "llama.cpp"


class StillWorker:
    """Takes no time; stands in where only the order of things matters."""

    def __init__(self, name: str, *, failing: str = "") -> None:
        self.name, self.failing, self.asked = name, failing, []

    def __getattr__(self, what: str):
        def answer(*args: object) -> object:
            self.asked.append((what, *args))
            if what == self.failing:
                raise BackendError(f"{self.name} cannot {what}")
            return [1e-3] * 3 if what == "decode" else 2e-3

        return answer


@pytest.fixture(scope="module")
def report() -> SuiteReport:
    geometry = dataclasses.replace(TINY, cases=(SuiteCase(2, 1, 2),), num_starts=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "SUBJECTS", (SPARSE, DENSE))
        patch.setattr(suite, "CONVERTED", ())
        return suite.run_suite(dataclasses.replace(SETTINGS, geometries=(geometry,)))


def test_every_round_of_every_start_is_there(report):
    (case,) = report.geometries[0].cases
    assert list(case.times) == [SPARSE, DENSE]
    for times in case.times.values():
        assert len(times.prefill_ms) == 2
        assert {length: len(found) for length, found in times.decode_ms.items()} == {
            0: 4,
            200: 4,
        }
        assert times.memory["prefill"].peak_rss_bytes <= times.memory["decode"].peak_rss_bytes


def test_sparse_decoder_is_asked_more(report):
    sparse = report.geometries[0].sparse
    row = 2 * 2 * 16 * 4
    assert sparse.dense_kv_bytes == (24 + 200) * row
    assert sparse.kv_bytes == (11 + round(200 * sparse.kept_share)) * row
    assert 0 < sparse.predictor_share < 1
    assert 0 < sparse.decode_overhead < 1


def test_numbers_survive_json(report):
    values = json.loads(json.dumps(report.to_json()))
    assert values["geometries"][0]["cases"][0]["batch_size"] == 2
    assert values["settings"]["num_threads"] == 1


def measure(workers: dict[str, StillWorker]):
    left_out: dict[str, str] = {}
    case = SuiteCase(1, 2, 2)
    return (
        suite._measure_case(case, workers, SETTINGS, left_out, lambda _: None),
        left_out,
    )


def test_subjects_take_turns():
    order: list[str] = []

    class Noted(StillWorker):
        def prefill(self, _: int) -> float:
            order.append(self.name)
            return 1e-3

    measure({SPARSE: Noted(SPARSE), DENSE: Noted(DENSE)})
    assert order == [SPARSE, DENSE, DENSE, SPARSE]


def test_peer_that_fails_is_left_out_and_the_others_go_on():
    case, left_out = measure(
        {SPARSE: StillWorker(SPARSE), MISSING: StillWorker(MISSING, failing="decode")}
    )
    assert left_out == {MISSING: "llama.cpp cannot decode"}
    assert list(case.times) == [SPARSE]
    assert case.times[SPARSE].decode_ms == {0: [1.0, 1.0], 200: [1.0, 1.0]}


def test_this_toolkit_must_not_fail():
    with pytest.raises(BackendError, match="sparse cannot decode"):
        measure({SPARSE: StillWorker(SPARSE, failing="decode")})
