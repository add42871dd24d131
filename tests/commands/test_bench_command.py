from __future__ import annotations

import pytest
from click.testing import CliRunner

from dllava_export.benchmark import bench as bench_module
from dllava_export.benchmark import report, suite
from dllava_export.benchmark.bench_report import BenchReport
from dllava_export.benchmark.bench_settings import BenchSettings
from dllava_export.benchmark.geometries import SuiteSettings
from dllava_export.cli import main


def bench(*arguments: object):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture
def asked(monkeypatch):
    """Stand in for all measuring; what was asked for."""
    found: dict[str, object] = {}

    def run_bench(folder, settings, *, progress):
        found.update(folder=folder, settings=settings)
        return BenchReport(settings, [], 1.0, "a machine", [])

    monkeypatch.setattr(bench_module, "run_bench", run_bench)
    monkeypatch.setattr(BenchReport, "to_text", lambda _: "a table")
    monkeypatch.setattr(suite, "run_suite", lambda s, *, progress: found.update(suite=s))
    monkeypatch.setattr(report, "report_summary", lambda _: "a summary")

    def write_report(_, folder):
        found["out"] = folder
        return [folder / "a.json"]

    monkeypatch.setattr(report, "write_report", write_report)
    return found


def test_backend_reaches_the_settings(asked):
    assert bench("out", "--backend", "tensorrt-rtx").exit_code == 0
    assert asked["settings"] == BenchSettings(backend="tensorrt-rtx")


def test_suite_measures_and_writes(asked, tmp_path):
    done = bench("--suite", "--out", tmp_path, "--threads", 3)
    assert done.stdout == f"a summary\nWrote {tmp_path}/a.json\n"
    assert asked == {"suite": SuiteSettings(num_threads=3), "out": tmp_path}


def test_suite_writes_where_the_repository_keeps_results(asked):
    assert bench("--suite").exit_code == 0
    assert str(asked["out"]) == "docs/benchmarks"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "Give a BUNDLE to time, or --suite", id="nothing"),
        pytest.param(["out", "--out", "x"], "--out belongs to --suite", id="out"),
        pytest.param(["out", "--suite"], "--suite was given with BUNDLE;", id="bundle"),
        pytest.param(
            ["--suite", "--rounds", "2", "--batch-size", "4"],
            "--suite was given with --batch-size, --rounds;",
            id="fixed settings",
        ),
        pytest.param(["out", "--backend", "magic"], "'magic' is not one of", id="backend"),
    ],
)
def test_what_does_not_go_together(asked, arguments, message):
    done = bench(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not asked
