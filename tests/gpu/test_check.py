from __future__ import annotations

import dataclasses
import functools
import json

import check
import gpu_kernels
import numpy as np
import pytest
import torch
from check import PARTS, main
from gpu_bundles import golden_prompts, random_prompt
from gpu_comparison import LIMITS, Prompt, Trace, compare, trace
from gpu_report import Report, Row
from gpu_speed import time_session

from dllava_export.backends import doctor
from dllava_export.backends.gpus import Gpu
from dllava_export.errors import BackendError
from dllava_export.plugins import check_kernels, kernel_cases
from dllava_export.plugins.check_kernels import CaseResult
from dllava_export.plugins.kernel_cases import KernelCase
from dllava_export.runtime.loading import load

FP32 = LIMITS["fp32"]


def make_trace(**changes):
    """Two samples, three steps, two layers, five words."""
    rng = np.random.default_rng(0)
    values = {
        "kept": np.array([[1, 4, 6], [0, 2, 3]]),
        "keep": np.array([[True, False], [False, False], [True, True]]),
        "lengths": np.arange(16).reshape(4, 2, 2),
        "logits": rng.normal(size=(4, 2, 5)).astype(np.float32),
        "recomputed": rng.normal(size=(1, 2, 5)).astype(np.float32),
        "no_recompute": "",
    }
    return Trace(**{**values, **changes})


def flipped(keep, step):
    keep = keep.copy()
    keep[step, 0] ^= True
    return keep


def test_equal_traces_agree():
    passed, figures = compare(make_trace(), make_trace(), FP32)
    assert passed
    assert figures["kept rows differing"] == figures["keep bits differing"] == 0
    assert figures["max abs"] == 0
    assert figures["cosine"] == pytest.approx(1)


EXPECTED = make_trace()
DIFFERENCES = {
    "kept rows": ({"kept": np.array([[1, 4, 7], [0, 2, 3]])}, "kept rows differing", 1),
    "keep bit": ({"keep": flipped(EXPECTED.keep, 1)}, "keep bits differing", 1),
    "lengths": ({"lengths": EXPECTED.lengths + 1}, "cache lengths", "differ"),
}


@pytest.mark.parametrize(("change", "figure", "value"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_difference_is_counted_and_fails(change, figure, value):
    passed, figures = compare(make_trace(**change), EXPECTED, FP32)
    assert not passed
    assert figures[figure] == value


def test_few_flips_are_allowed_in_half_precision():
    found = make_trace(keep=flipped(EXPECTED.keep, 1))
    assert compare(found, EXPECTED, LIMITS["fp16"])[0]


def test_logits_are_compared_until_something_flips():
    logits = EXPECTED.logits.copy()
    logits[3] += 0.01
    assert not compare(make_trace(logits=logits), EXPECTED, FP32)[0]
    found = make_trace(logits=logits, keep=flipped(EXPECTED.keep, 1))
    assert compare(found, EXPECTED, FP32)[1]["max abs"] == 0


@pytest.mark.parametrize("bad", [np.nan, 100.0])
def test_bad_logits_fail(bad):
    logits = EXPECTED.logits.copy()
    logits[2, 1, 3] = bad
    assert not compare(make_trace(logits=logits), EXPECTED, LIMITS["fp16"])[0]


def test_a_session_agrees_with_itself(bundles):
    session = bundles.session("mha")
    prompt = Prompt(
        np.array([[5, -200, 6]]),
        {"image_features": np.full((1, 36, 64), 0.01, np.float32)},
        np.array([[7], [8], [9]]),
        recompute_lengths=(2,),
    )
    first = trace(session, prompt)
    assert first.logits.shape == (4, 1, 131)
    assert first.recomputed.shape == (1, 1, 131)
    passed, figures = compare(trace(session, prompt), first, FP32)
    assert passed
    assert figures["max abs"] == 0


def test_a_pass_that_a_backend_lacks_is_told(bundles, monkeypatch):
    session = bundles.fresh_session("mha")

    monkeypatch.setattr(session, "recompute", lambda *_, **__: refuse())
    features = {"image_features": np.zeros((1, 36, 64), np.float32)}
    prompt = Prompt(np.array([[5, -200]]), features, np.array([[7]]), (1,))
    found = trace(session, prompt)
    assert found.recomputed is None
    assert found.no_recompute == "no such device"


def test_times_prefill_and_steps(bundles):
    features = {"image_features": np.zeros((1, 36, 64), np.float32)}
    prompt = Prompt(np.array([[5, -200]]), features, np.array([[7]]))
    figures = time_session(bundles.session("mha"), prompt, (0, 8))
    assert set(figures) == {"prefill ms", "decode@0 ms", "decode@8 ms", "KV MiB"}
    assert all(value > 0 for value in figures.values())


def test_copy_bandwidth_counts_bytes_read_and_written(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    monkeypatch.setattr(gpu_kernels, "milliseconds", lambda start: start() or 0.5)
    monkeypatch.setattr(gpu_kernels, "COPY_BYTES", 1024)
    assert gpu_kernels.copy_bandwidth() == pytest.approx(2 * 1024 / 0.5e-3)


def test_a_kernel_that_cannot_be_started_is_a_mismatch(monkeypatch):
    case = KernelCase("SelectTokens", {"batch": 1, "rows": 2, "num_kept": 1})
    results = iter([OSError("no such kernel"), CaseResult(case, 0.25, 1.0, 0, 4000, 2)])

    def check(case, device):
        found = next(results)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(gpu_kernels, "PLUGIN_OPS", ("SelectTokens",))
    monkeypatch.setattr(gpu_kernels, "copy_bandwidth", lambda: 2e9)
    monkeypatch.setattr(gpu_kernels, "milliseconds", lambda start: 0.5)
    monkeypatch.setattr(kernel_cases, "full_cases", lambda op: [case, case])
    monkeypatch.setattr(check_kernels, "check_case", check)
    monkeypatch.setattr(check_kernels, "prepare_case", lambda case, device: (None, {}))
    report = Report({})
    gpu_kernels.check_kernels(report)
    assert [row.passed for row in report.rows] == [False, True]
    assert report.rows[0].figures == {"failure": "OSError: no such kernel"}
    assert report.rows[1].figures["GB/s"] == pytest.approx(0.008)
    assert report.rows[1].figures["share of bandwidth"] == pytest.approx(0.004)


def test_results_survive_a_crash(tmp_path, monkeypatch):
    def crash(report, options):
        report.rows.append(Row("compare", "tiny", passed=True, figures={}))
        raise MemoryError

    found = dataclasses.replace(doctor.collect(), gpus=(Gpu("L4", 1, None, "8.9"),))
    monkeypatch.setattr(doctor, "collect", lambda: found)
    monkeypatch.setattr(check, "run_compare", crash)
    with pytest.raises(MemoryError):
        main(["--out", str(tmp_path), "--parts", "compare"])
    document = json.loads((tmp_path / "check.json").read_text())
    assert [row["subject"] for row in document["rows"]] == ["tiny"]


def refuse(*args):
    raise BackendError("no such device")


def use_subjects(monkeypatch):
    """Let the CPU stand where GPUs would: one subject works, one does not."""
    subjects = {"cpu": lambda folder: load(folder, num_threads=1), "broken": refuse}
    monkeypatch.setattr(
        check,
        "_subjects",
        lambda folder, *_: {n: functools.partial(f, folder) for n, f in subjects.items()},
    )


def test_bundles_are_compared_subject_by_subject(bundles, monkeypatch):
    use_subjects(monkeypatch)
    report = Report({})
    folder = bundles.path("mha")
    check._compare_bundle(report, folder, golden_prompts("mha"))
    assert [row.subject for row in report.rows] == [
        f"{folder.name} case_1, cpu",
        f"{folder.name} case_2, cpu",
    ]
    assert all(row.passed and row.figures["max abs"] == 0 for row in report.rows)
    assert report.left_out == [f"compare {folder.name}, broken: no such device"]


def test_subjects_are_timed_at_each_batch_size(bundles, monkeypatch):
    monkeypatch.setattr(check, "BATCHES", (1, 2))
    monkeypatch.setattr(check, "LENGTHS", (0, 4))
    report = Report({})
    folder = bundles.path("mha")
    session = bundles.session("mha")
    check._time_subject(report, "sparse, cpu", lambda: session, random_prompt, folder)
    check._time_subject(report, "sparse, broken", refuse, random_prompt, folder)
    titles = [row.subject for row in report.rows]
    assert titles == ["sparse, cpu, batch 1", "sparse, cpu, batch 2"]
    assert all(row.figures["decode@4 ms"] > 0 for row in report.rows)
    assert report.left_out == ["speed of sparse, broken: no such device"]


def test_the_report_tells_everything(tmp_path):
    report = Report({"GPU 0": "L4"})
    report.rows.append(Row("compare", "tiny", passed=True, figures={"cosine": 0.99999}))
    report.rows.append(Row("compare", "small", passed=False, figures={"max abs": 3.0}))
    report.rows.append(Row("speed", "large", passed=None, figures={"prefill ms": 12.345678}))
    report.left_out.append("tensorrt: not installed")
    report.write(tmp_path)
    assert report.num_mismatches == 1
    document = json.loads((tmp_path / "check.json").read_text())
    assert document["rows"][1] == dataclasses.asdict(report.rows[1])
    markdown = (tmp_path / "check.md").read_text()
    assert "| subject | cosine | max abs | equal |" in markdown
    assert "| tiny | 1 |  | yes |" in markdown
    assert "| small |  | 3 | **no** |" in markdown
    assert "| large | 12.35 |  |" in markdown
    assert "- tensorrt: not installed" in markdown
    text = report.to_text()
    assert "MISMATCH  compare: small" in text
    assert text.endswith("3 results, 1 mismatches")


def test_says_what_a_machine_without_gpu_left_out(tmp_path, capsys):
    if doctor.collect().gpus:
        pytest.skip("there is an NVIDIA GPU")
    reason = "there is no NVIDIA GPU: nvidia-smi and PyTorch see none"
    assert main(["--out", str(tmp_path), "--parts", "compare", "speed"]) == 0
    document = json.loads((tmp_path / "check.json").read_text())
    assert document["rows"] == []
    assert document["left_out"] == [
        f"compare: {reason}",
        "kernels: not asked for (--parts)",
        f"speed: {reason}",
    ]
    assert document["environment"]["Python"]
    assert "0 results, 0 mismatches" in capsys.readouterr().out


def test_knows_its_parts(capsys):
    with pytest.raises(SystemExit):
        main(["--parts", "everything"])
    message = capsys.readouterr().err
    assert all(part in message for part in PARTS)
