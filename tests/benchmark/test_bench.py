from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from dllava_export.benchmark.bench import measure_subjects, run_bench, subject_makers
from dllava_export.benchmark.bench_report import BenchReport, Measurement
from dllava_export.benchmark.bench_settings import BenchSettings
from dllava_export.benchmark.machine import machine_line
from dllava_export.benchmark.subject import BundleSubject
from dllava_export.bundles.manifest import read_manifest, write_manifest
from dllava_export.errors import BackendError
from dllava_export.precision import Precision

pytestmark = pytest.mark.slow

SETTINGS = BenchSettings(
    prompt_text_len=10, decode_lengths=(0, 20), num_threads=1, rounds=1, decode_steps=1
)
# The golden GQA checkpoint: 3 full and 2 sparse layers, 64 image tokens of which 18 stay, half
# of the generated tokens; 2 KV heads of 16 in float32, keys and values.
ROW = 2 * 2 * 16 * 4
PROMPT, KEPT = 10 + 64, 10 + 18


@pytest.fixture(scope="module")
def report(bundles) -> BenchReport:
    return run_bench(bundles.path("gqa"), SETTINGS)


def subjects(report: BenchReport) -> dict[str, Measurement]:
    return {subject.name: subject for subject in report.subjects}


def test_compares_three_subjects(report):
    assert list(subjects(report)) == ["sparse", "dense", "transformers"]
    assert report.left_out == []


def test_times_and_memory_are_positive(report):
    for subject in report.subjects:
        assert subject.prefill_ms > 0
        assert subject.decode_ms.keys() == {0, 20}
        assert min(subject.decode_ms.values()) > 0
        assert subject.peak_rss_bytes > 10 << 20
    assert report.capacity_ratio > 0


@pytest.mark.parametrize(
    ("name", "length", "rows"),
    [
        pytest.param("sparse", 0, 3 * PROMPT + 2 * KEPT, id="sparse prompt"),
        pytest.param("sparse", 20, 3 * (PROMPT + 20) + 2 * (KEPT + 10), id="sparse"),
        pytest.param("dense", 0, 5 * PROMPT, id="dense prompt"),
        pytest.param("dense", 20, 5 * (PROMPT + 20), id="dense"),
        pytest.param("transformers", 20, 5 * (PROMPT + 20), id="transformers"),
    ],
)
def test_kv_bytes_follow_the_formula(report, name, length, rows):
    assert subjects(report)[name].kv_bytes[length] == rows * ROW


def test_allocated_kv_bytes_cover_the_longest_answer(report):
    # 20 tokens, the timed step, two spare ones; a spare row in each buffer.
    full, sparse = PROMPT + 23 + 1, KEPT + 23 + 1
    found = {name: subject.kv_allocated_bytes for name, subject in subjects(report).items()}
    assert found["dense"] == 5 * full * ROW
    assert found["sparse"] == (3 * full + 2 * sparse) * ROW


def test_json_holds_everything(report):
    values = json.loads(json.dumps(report.to_json()))
    assert [subject["name"] for subject in values["subjects"]] == list(subjects(report))
    assert values["subjects"][0]["kv_bytes"]["20"] == report.subjects[0].kv_bytes[20]
    assert values["settings"]["decode_lengths"] == [0, 20]
    assert values["machine"] == machine_line()


def test_table_gives_ratios_over_sparse():
    sparse = Measurement("sparse", 10.0, {0: 2.0}, {0: 1 << 20}, 2 << 20, 3 << 20)
    dense = Measurement("dense", 25.0, {0: 3.0}, {0: 4 << 20}, 5 << 20, 6 << 20)
    settings = BenchSettings(decode_lengths=(0,))
    report = BenchReport(settings, [sparse, dense], 1.04, "a machine", ["this: why"])
    assert report.to_text().splitlines() == [
        "a machine; 2 threads, batch 1, prompt of 64 text tokens and one image",
        "times in ms, medians of 5 interleaved rounds; in brackets: times as long as sparse",
        "            prefill    decode@0  KV used  KV alloc  peak RSS",
        "sparse  10.0 (1.00)  2.0 (1.00)  1.0 MiB   2.0 MiB   3.0 MiB",
        "dense   25.0 (2.50)  3.0 (1.50)  4.0 MiB   5.0 MiB   6.0 MiB",
        "decode with 4 x the cache capacity, same length: 1.04 x the time",
        "left out: this: why",
    ]


@pytest.mark.parametrize(
    ("changes", "sparsity", "reasons", "names"),
    [
        pytest.param({}, {"policy": "none"},
                     ["sparse: the bundle is dense; `dllava-export sparsify` makes a sparse one"],
                     ["dense", "transformers"], id="dense"),
        pytest.param({"precision": Precision.of("fp16")}, {},
                     ["transformers: compared at fp32 only, the bundle is fp16"],
                     ["sparse", "dense"], id="half precision"),
    ],
)  # fmt: skip
def test_says_what_is_left_out(bundles, changes, sparsity, reasons, names):
    folder = bundles.path("gqa", **sparsity)
    manifest = dataclasses.replace(read_manifest(folder), **changes)
    makers, left_out = subject_makers(folder, manifest, SETTINGS)
    assert left_out == reasons
    assert list(makers) == names


@pytest.mark.parametrize(
    ("policy", "names", "reason"),
    [
        pytest.param({}, ["sparse"], "dense: the engines of tensorrt-rtx are the sparse",
                     id="sparse"),
        pytest.param({"policy": "none"}, ["dense"], "sparse: the bundle is dense", id="dense"),
    ],
)  # fmt: skip
def test_engines_are_timed_alone(bundles, policy, names, reason):
    settings = dataclasses.replace(SETTINGS, backend="tensorrt-rtx")
    folder = bundles.path("gqa", **policy)
    makers, left_out = subject_makers(folder, read_manifest(folder), settings)
    assert list(makers) == names
    assert left_out[0].startswith(reason)
    assert left_out[1] == "transformers: compared with ONNX Runtime only"


def test_every_subject_takes_its_turns():
    still = {"one": StillSubject(), "two": StillSubject()}
    settings = dataclasses.replace(SETTINGS, rounds=2)
    report = measure_subjects({name: lambda s=s: s for name, s in still.items()}, settings)
    assert list(subjects(report)) == ["one", "two"]
    for subject in still.values():
        # A turn per round and length: a step that warms up and one that is timed.
        assert subject.calls == ["prefill", "fill", "decode", "decode"] * 2 * 2
    assert report.capacity_ratio is None  # of sessions only
    assert "cache capacity" not in report.to_text()


def test_refuses_a_bundle_without_a_vision_tower(bundles, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(bundles.path("gqa"), folder, copy_function=shutil.copyfile)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), has_visual=False))
    with pytest.raises(BackendError, match="has no vision tower; bench expects a bundle"):
        run_bench(folder, SETTINGS)


class StillSubject(BundleSubject):
    """Takes no time."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prefill(self) -> None:
        self.calls.append("prefill")

    def fill(self, num_generated: int) -> None:
        self.calls.append("fill")

    def decode(self) -> None:
        self.calls.append("decode")

    def kv_bytes(self, length: int) -> int:
        return length

    def kv_allocated_bytes(self) -> int:
        return 0
