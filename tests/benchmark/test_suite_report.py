from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_suite import SETTINGS, TINY

from dllava_export.benchmark.geometries import SuiteCase
from dllava_export.benchmark.report import report_markdown, report_summary, write_report
from dllava_export.benchmark.results import (
    CaseResult,
    GeometryResult,
    SparseFacts,
    SubjectTimes,
    SuiteReport,
)
from dllava_export.benchmark.subject import DENSE, SPARSE
from dllava_export.benchmark.worker import Memory, SubjectFacts

MACHINE = {
    "processor": "A processor",
    "cores": 2,
    "memory_bytes": 8 << 30,
    "system": "Linux 6",
    "python": "3.11",
}


@pytest.fixture
def report() -> SuiteReport:
    memory = {"prefill": Memory(1 << 20, 2 << 20), "decode": Memory(1 << 20, 3 << 20)}
    times = {
        SPARSE: SubjectTimes([10.0, 12.0], {0: [2.0, 2.0], 200: [4.0, 4.0]}, None, memory),
        DENSE: SubjectTimes([30.0, 24.0], {0: [3.0, 2.0], 200: [4.0, 8.0]}, 2e-6, memory),
    }
    geometry = dataclasses.replace(TINY, cases=(SuiteCase(1, 2, 2),))
    result = GeometryResult(
        geometry,
        {SPARSE: SubjectFacts("toolkit 1", "as is"), DENSE: SubjectFacts("toolkit 1", "")},
        {SPARSE: Memory(1 << 20, 1 << 20), DENSE: Memory(1 << 20, None)},
        [CaseResult(1, times)],
        SparseFacts(0.51, 40, 100, 0.014, 0.012, 0.023),
        {"llama.cpp": "No module named 'llama_cpp'"},
    )
    return SuiteReport("2026-01-02", MACHINE, SETTINGS, [result], 600.0)


@pytest.mark.parametrize(
    "line",
    [
        "`dllava-export bench --suite`, 10 minutes. A processor, 2 cores, 8.00 GiB RAM, Linux 6, "
        "Python 3.11. 1 threads for every subject.",
        "Starts of all processes: 1. Rounds in each: 2 of prefill, 2 of decode. Times in ms.",
        "| dllava-export, dense | 27.0 (24.0 to 30.0) | 2.5 (2.0 to 3.0) | 6.0 (4.0 to 8.0) |",
        "| dllava-export, dense | 2.50 (2.00 to 3.00) | 1.25 (1.00 to 1.50) | "
        "1.50 (1.00 to 2.00) |",
        "| dllava-export, sparse | 1.0 MiB | 2.0 MiB | 3.0 MiB |",
        "| dllava-export, dense | unknown | 2.0 MiB | 3.0 MiB |",
        "| dllava-export, dense | toolkit 1 |  | 2.0e-06 |",
        "- llama.cpp: No module named 'llama_cpp'",
        "![times and memory](2026-01-02_suite_tiny.png)",
    ],
)
def test_markdown_has_the_line(report, line):
    assert line in report_markdown(report).splitlines()


@pytest.mark.parametrize(
    "words",
    [
        "40 bytes of the dense 100 bytes, 40.0%. The predictor, calibrated to 50% on "
        "these tokens, kept 51.0% of",
        "outside ONNX Runtime, batch 1: 1.4% sparse, 1.2% dense.",
        "from ONNX Runtime's profile: 2.3%.",
    ],
)
def test_markdown_says_what_the_sparse_decoder_took(report, words):
    assert words in report_markdown(report)


def test_summary_has_ratios_over_sparse(report):
    assert report_summary(report).splitlines() == [
        "times as long as sparse: prefill, then decode by generated tokens",
        "tiny, batch 1",
        "  sparse                       1.00  0: 1.00  200: 1.00",
        "  dense                        2.50  0: 1.25  200: 1.50",
        "  left out: llama.cpp: No module named 'llama_cpp'",
    ]


def test_files_are_dated_and_complete(report, tmp_path):
    folder = tmp_path / "new" / "results"
    paths = write_report(report, folder)
    assert [path.name for path in paths] == [
        "2026-01-02_suite.json",
        "2026-01-02_suite.md",
        "2026-01-02_suite_tiny.png",
    ]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert json.loads(paths[0].read_text())["machine"]["cores"] == 2
    assert paths[2].read_bytes().startswith(b"\x89PNG")
