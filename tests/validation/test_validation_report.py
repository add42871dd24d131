from __future__ import annotations

import json

import pytest
from validation_reports import STEPS, check, make_report

from dllava_export.sparsity import DENSE


def line(report, *words):
    (found,) = (
        row for row in report.to_text().splitlines() if row.split()[: len(words)] == [*words]
    )
    return found


def test_a_match_says_how_much_was_compared():
    report = make_report(check("prefill", "logits"), check("recompute", "logits", "drift"))
    assert report.passed
    assert report.to_text().splitlines()[-1] == "MATCH: 1 comparisons agree, 1 only measured."


def test_the_heading_says_what_was_run():
    text = make_report(check("prefill", "logits")).to_text()
    assert "out (fp32, policy predictor, sparse layer 1)" in text
    assert (
        "60 prompt rows, 36 of them an image; 3 forced tokens (random values, seed 0)" in text
    )
    assert "rtol 0.0001, atol 0.0002, elemwise; margin 0.0001" in text
    dense = make_report(check("prefill", "logits"), sparsity=DENSE)
    assert "out (fp32, dense)" in dense.to_text()


def test_steps_are_put_together():
    report = make_report(*STEPS)
    found = line(report, "decode", "logits", "match")
    assert "3.0e-06" in found
    assert found.endswith("3 steps, same token in 2")


def test_the_first_failing_step_is_named():
    wrong = check("decode.2", "keep", "mismatch", detail="kept, expected dropped")
    report = make_report(check("decode.1", "keep"), wrong)
    found = line(report, "decode", "keep", "mismatch")
    assert found.endswith("1 of 2 steps, first decode.2: kept, expected dropped")
    assert report.first_mismatch is wrong
    assert not report.passed


def test_a_mismatch_names_its_place_and_the_next_thing_to_do():
    report = make_report(check("prefill", "logits", "mismatch", 0.25, "token 1, expected 2"))
    assert report.to_text().endswith(
        "MISMATCH: 1 of 1 comparisons fail. The first is prefill/logits: token 1, expected 2; "
        "max abs 0.5, relative 0.25, cosine 1.000000.\n"
        "Run again with --layers to see in which layer it starts."
    )


@pytest.mark.parametrize(
    ("verdict", "mark"), [("match", ""), ("drift", "~"), ("mismatch", "!")]
)
def test_layers_have_a_table_of_their_own(verdict, mark):
    report = make_report(
        check("prefill", "layers.0/key"),
        check("decode.0", "layers.1/hidden_states", verdict, 0.5),
        check("decode.1", "layers.1/hidden_states"),
    )
    assert report.has_layers
    assert line(report, "0").split() == ["0", "1.0e-06"]
    assert line(report, "1").split() == ["1", "5.0e-01", *([mark] if mark else [])]
    assert "--layers" not in report.to_text()


def test_json_holds_everything():
    document = json.loads(json.dumps(make_report(*STEPS).to_json()))
    assert document["passed"] is True
    assert document["first_mismatch"] is None
    assert document["conversation"]["num_prompt"] == 60
    assert document["tolerances"]["rtol"] == 1e-4
    assert [entry["stage"] for entry in document["checks"]] == [
        "decode.0",
        "decode.1",
        "decode.2",
    ]
    failed = make_report(check("prefill", "logits", "mismatch")).to_json()
    assert (failed["passed"], failed["first_mismatch"]) == (False, "prefill/logits")
