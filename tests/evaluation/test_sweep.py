from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from places import CAT

from dllava_export import cli
from dllava_export.errors import InvalidInputError, SettingError
from dllava_export.evaluation.evaluate import evaluate_bundles
from dllava_export.evaluation.questions import EvaluationError
from dllava_export.evaluation.report import EvaluationReport
from dllava_export.evaluation.settings import EvaluationSettings
from dllava_export.evaluation.sweep_plot import plot_sweep

SWEEP = EvaluationSettings(
    image_keep_tokens=(3, 9), policies=("random", "predictor"), max_new_tokens=3
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "questions.jsonl"
    records = [
        {"image": str(CAT), "text": "w5 w6", "answer": "w6"},
        {"text": "w7", "answer": "w1"},
        {"image": str(CAT), "text": "w8", "answer": "w2"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def report(bundles, data) -> EvaluationReport:
    settings = dataclasses.replace(SWEEP, allow_outside=True)
    return evaluate_bundles([bundles.path("mha")], data, settings)


def test_every_policy_with_every_number_of_tokens_and_dense(report):
    found = [
        (result.name, result.policy, result.total.kept_image_tokens)
        for result in report.results
    ]
    assert found == [
        ("dense", "none", 36.0),
        ("random 3", "random", 3.0), ("random 9", "random", 9.0),
        ("predictor 3", "predictor", 3.0), ("predictor 9", "predictor", 9.0),
    ]  # fmt: skip


def test_a_sweep_answers_as_bundles_made_by_hand(bundles, data, report):
    made = bundles.path("mha", policy="random", image_keep_tokens=9)
    settings = EvaluationSettings(max_new_tokens=3, allow_outside=True)
    (expected,) = evaluate_bundles([made], data, settings).results
    assert [a.text for a in report.results[2].answers] == [a.text for a in expected.answers]


def test_the_bundle_stays_and_nothing_else(bundles, report):
    folder = bundles.path("mha")
    assert {result.path for result in report.results} == {folder}
    assert not list(folder.parent.glob(".*sweep*"))


def test_one_table(report):
    heading, empty, title, columns, *rows = report.to_text().split("\n")
    assert heading.startswith("3 questions of questions.jsonl, metric exact")
    assert (empty, title) == ("", "Sweep: right / asked, share, 95 % interval")
    assert columns.split("  ")[-1].strip() == "gain over random"
    assert [row.split("  ")[0] for row in rows] == [result.name for result in report.results]
    # None of three right: z² / (3 + z²) = 3.8415 / 6.8415 = 56.1 %.
    assert any("0/3  0.0 % [0.0, 56.1]" in row for row in rows)


def test_gains_are_over_random_with_as_many_tokens(report):
    dense, *others = report.results
    assert report.gain_over_random(dense) is None
    better = [dataclasses.replace(a, score=1.0) for a in others[1].answers]
    others[1] = dataclasses.replace(others[1], answers=tuple(better))
    found = dataclasses.replace(report, results=(dense, *others))
    gains = [found.gain_over_random(result) for result in others]
    assert gains == [None, None, 0.0, pytest.approx(-100.0)]


def test_several_bundles(bundles, data):
    settings = EvaluationSettings(
        image_keep_tokens=(4,), policies=("uniform",), max_new_tokens=1, allow_outside=True
    )
    paths = [bundles.path("mha"), bundles.path("mha", policy="none")]
    results = evaluate_bundles(paths, data, settings).results
    names = [f"{path.name}: {what}" for path in paths for what in ("dense", "uniform 4")]
    assert [result.name for result in results] == names


def test_the_policy_of_the_bundle_with_its_other_settings(bundles, data):
    path = bundles.path("mha", policy="random", output_text_keep_rate=1.0, sparse_layer=1)
    settings = EvaluationSettings(image_keep_tokens=(4,), max_new_tokens=3, allow_outside=True)
    swept = evaluate_bundles([path], data, settings).results[1]
    assert (swept.name, swept.total.output_text_keep_rate) == ("random 4", 1.0)
    # All layers but the first see fewer rows.
    use = swept.answers[0].kv
    assert use.dense_sparse_bytes == pytest.approx(use.dense_bytes * 3 / 4)


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_plot(report, tmp_path, name):
    plot_sweep(report, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5_000


def test_plot_has_a_line_per_policy(report, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.errorbar

    def errorbar(axes, places, shares, lengths, **style):
        drawn.append((style["label"], list(places)))
        return original(axes, places, shares, lengths, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    plot_sweep(report, tmp_path / "a.png")
    seconds = {result.name: result.seconds_per_question for result in report.results}
    assert drawn == [
        ("dense", [36.0]), ("dense", [seconds["dense"]]),
        ("random", [3.0, 9.0]), ("random", [seconds["random 3"], seconds["random 9"]]),
        ("predictor", [3.0, 9.0]),
        ("predictor", [seconds["predictor 3"], seconds["predictor 9"]]),
    ]  # fmt: skip


def test_a_plot_needs_a_sweep(report, tmp_path):
    other = dataclasses.replace(report, settings=EvaluationSettings())
    with pytest.raises(InvalidInputError, match="expected one of several numbers of image"):
        plot_sweep(other, tmp_path / "a.png")


# What cannot be swept.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_keep_tokens": [0]}, "image_keep_tokens must be at least 1, got 0"),
        ({"image_keep_tokens": [4, 4]}, "must not name one twice"),
        ({"image_keep_tokens": [4], "policies": ["none"]}, "a sweep always asks the dense"),
        ({"policies": ["random"]}, "are for a sweep, which needs image_keep_tokens"),
    ],
)
def test_settings(values, message):
    with pytest.raises(SettingError, match=message):
        EvaluationSettings(**values)


@pytest.mark.parametrize(
    ("policy", "values", "backend", "message"),
    [
        pytest.param("predictor", {"image_keep_tokens": [37]}, "onnxruntime",
                     r"37 image tokens were asked for, and an image has 36 in", id="too many"),
        pytest.param("none", {"image_keep_tokens": [4]}, "onnxruntime",
                     "is dense and has no policy to sweep", id="no policy"),
        pytest.param("predictor", {"image_keep_tokens": [4]}, "tensorrt-rtx",
                     "which have no engines for backend 'tensorrt-rtx'", id="engines"),
    ],
)  # fmt: skip
def test_sweeps_that_cannot_be(bundles, data, policy, values, backend, message):
    path = bundles.path("mha", **({} if policy == "predictor" else {"policy": policy}))
    with pytest.raises(EvaluationError, match=message):
        evaluate_bundles([path], data, EvaluationSettings(**values), backend=backend)


def test_a_sweep_needs_a_question_about_an_image(bundles, tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"text": "w5", "answer": "w6"}]))
    with pytest.raises(EvaluationError, match="has no question about an image"):
        evaluate_bundles([bundles.path("mha")], path, SWEEP)


# The command.


def run(*arguments: object):
    return CliRunner().invoke(cli.main, ["evaluate", *(str(a) for a in arguments)])


def test_command(bundles, data, tmp_path):
    result = run(
        bundles.path("mha"), data, "--allow-outside", "--image-keep-tokens", "4,8", "--policy",
        "uniform", "--limit", 1, "--max-new-tokens", 1, "--threads", 1, "--metric", "contains",
        "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "metric contains" in result.stdout
    assert result.stdout.endswith(f"Wrote {tmp_path}/a.json\nDrew {tmp_path}/a.png\n")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["settings"]["image_keep_tokens"] == [4, 8]
    assert [b["name"] for b in content["bundles"]] == ["dense", "uniform 4", "uniform 8"]
    assert len(content["bundles"][0]["summaries"]["total"]["interval_95"]) == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--plot", "a.png"], 2, "give --image-keep-tokens"),
        (["--policy", "random"], 2, "give --image-keep-tokens"),
        (["--image-keep-tokens", "4,b"], 2, "expected numbers like 32,64,115; got '4,b'"),
        (["--image-keep-tokens", "4", "--plot", "a.txt"], 1, "has suffix '.txt'"),
        (["--metric", "bleu"], 2, "'bleu' is not one of"),
        (["--metric", "vqa"], 1, "line 1 has one answer, 'w6', expected those of several"),
    ],
)
def test_wrong_commands(bundles, data, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    result = run(bundles.path("mha"), data, "--allow-outside", *options)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())


def test_pope_in_tables_and_json(bundles, tmp_path):
    path = tmp_path / "pope.jsonl"
    labels = ["yes", "no", "no"]
    records = [
        {"question_id": n, "text": "w5", "label": label} for n, label in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = EvaluationSettings(max_new_tokens=2)
    found = evaluate_bundles([bundles.path("mha")], path, settings)
    # Random words hold no `no`, so all say yes: TP 1, FP 2.
    assert found.settings.metric == "pope"
    assert "Metric pope" in found.to_text()
    details = found.to_json()["bundles"][0]["details"]["total"]
    assert (details["precision"]["count"], details["precision"]["total"]) == (1.0, 3)
    assert (details["recall"]["share"], details["yes-rate"]["share"]) == (1.0, 1.0)
    assert details["F1"] == pytest.approx(0.5)  # 2 · 1 / (2 · 1 + 2 + 0)
