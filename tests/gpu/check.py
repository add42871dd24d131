"""Check and time everything that needs an NVIDIA GPU: `python tests/gpu/check.py`.

It runs whatever part the machine allows and says what it left out. The exit code is 1 if
something was compared and found different, else 0. Nothing needs a network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from gpu_comparison import LIMITS, Prompt, compare, trace  # noqa: E402
from gpu_report import Report, Row  # noqa: E402

from dllava_export.backends import doctor  # noqa: E402
from dllava_export.backends.trt.trt_module import trt_module  # noqa: E402
from dllava_export.bundles.manifest import read_manifest  # noqa: E402
from dllava_export.errors import DllavaExportError  # noqa: E402
from dllava_export.runtime.loading import load  # noqa: E402
from dllava_export.runtime.session import Session  # noqa: E402

__all__ = ["PARTS", "main"]

PARTS = ("compare", "kernels", "speed")
_ENGINES = ("tensorrt-rtx", "tensorrt")
LENGTHS = (0, 512, 1024)
BATCHES = (1, 4)
_MAX_INPUT_LEN, _CAPACITY = 704, 2049


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for and return the exit code."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found = doctor.collect()
    report = Report(_environment(found))
    reason = "" if found.gpus else "there is no NVIDIA GPU: nvidia-smi and PyTorch see none"
    for part, run in (("compare", run_compare), ("kernels", _kernels), ("speed", _speed)):
        if part not in options.parts:
            report.leave_out(f"{part}: not asked for (--parts)")
        elif reason:
            report.leave_out(f"{part}: {reason}")
        else:
            try:
                run(report, options)
            finally:
                report.write(options.out)  # what is there survives a crash
    report.write(options.out)
    sys.stdout.write(f"{report.to_text()}\nWrote {options.out}/check.json and check.md\n")
    return 1 if report.num_mismatches else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), help="results, bundles and engines"
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        help="bundle to time instead of the random one; engines are built into it",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return parser.parse_args(arguments)


def _environment(found: doctor.DoctorReport) -> dict[str, str]:
    versions = {name: version for name, version in found.packages.items() if version}
    gpus = {
        f"GPU {number}": f"{gpu.name}, {gpu.memory_mib} MiB, driver {gpu.driver}, compute "
        f"capability {gpu.compute_capability}"
        for number, gpu in enumerate(found.gpus)
    }
    today = date.today().isoformat()
    return {"date": today, "system": found.system, "Python": found.python, **gpus, **versions}


def _subjects(folder: Path, report: Report, batch: int) -> dict[str, Callable[[], Session]]:
    """Return how each backend that works here opens a bundle; engines are built if needed."""
    subjects: dict[str, Callable[[], Session]] = {}
    for backend in _ENGINES:
        try:
            trt_module(backend)
        except DllavaExportError as error:
            report.leave_out(f"{backend}: {error}")
            continue
        try:
            _build(folder, backend, batch)
        except DllavaExportError as error:
            report.leave_out(f"{backend}, {folder.name}: {error}")
            continue
        subjects[backend] = lambda backend=backend: load(folder, backend)  # type: ignore[misc]
        subjects[f"{backend}, no CUDA graph"] = lambda backend=backend: load(  # type: ignore[misc]
            folder, backend, cuda_graph=False
        )
    subjects["onnxruntime cuda"] = lambda: load(folder, provider="cuda")
    return subjects


def _build(folder: Path, backend: str, batch: int) -> None:
    from dllava_export.backends.trt.build.build_engines import build_engines
    from dllava_export.backends.trt.build.build_options import BuildOptions
    from dllava_export.backends.trt.engine_config import engine_folder

    if (engine_folder(folder, backend) / "config.json").is_file():
        return
    manifest = read_manifest(folder, verify=False)
    capacity = min(_CAPACITY, manifest.max_position_embeddings + 1)
    options = BuildOptions(
        backend,
        max_batch_size=batch,
        max_input_len=min(_MAX_INPUT_LEN, capacity - 1),
        max_kv_cache_capacity=capacity,
    )
    build_engines(folder, options)


def run_compare(report: Report, options: argparse.Namespace) -> None:
    """Compare every backend with ONNX Runtime on the CPU."""
    from gpu_bundles import golden_bundle, golden_prompts, large_bundle, random_prompt

    for checkpoint in ("mha", "gqa"):
        prompts = golden_prompts(checkpoint)
        for precision in ("fp32", "fp16"):
            folder = golden_bundle(options.out, checkpoint, precision)
            _compare_bundle(report, folder, prompts)
    folder = large_bundle(options.out)
    _compare_bundle(report, folder, {"batch 2": random_prompt(folder, batch=2)})


def _compare_bundle(report: Report, folder: Path, prompts: dict[str, Prompt]) -> None:
    limits = LIMITS[str(read_manifest(folder, verify=False).precision)]
    reference = load(folder)
    expected = {name: trace(reference, prompt) for name, prompt in prompts.items()}
    for subject, open_session in _subjects(folder, report, max(BATCHES)).items():
        try:
            session = open_session()
            for name, prompt in prompts.items():
                found = trace(session, prompt)
                passed, figures = compare(found, expected[name], limits)
                title = f"{folder.name} {name}, {subject}"
                report.rows.append(Row("compare", title, passed, figures))
                if found.no_recompute:
                    report.leave_out(f"recompute of {title}: {found.no_recompute}")
        except DllavaExportError as error:
            report.leave_out(f"compare {folder.name}, {subject}: {error}")


def _kernels(report: Report, options: argparse.Namespace) -> None:
    """Check and time the plugins' kernels."""
    import torch

    if not torch.cuda.is_available():
        report.leave_out(f"kernels: PyTorch {torch.__version__} sees no GPU")
        return
    from gpu_kernels import check_kernels

    check_kernels(report)


def _speed(report: Report, options: argparse.Namespace) -> None:
    """Time the sparse bundle against its dense form, at several batch sizes and lengths."""
    from gpu_bundles import dense_form, large_bundle, random_prompt

    sparse = options.bundle or large_bundle(options.out)
    dense = dense_form(sparse, options.out / f"{sparse.name}_dense")
    forms = {"sparse": sparse, "dense": dense}
    for form, folder in forms.items():
        for subject, open_session in _subjects(folder, report, max(BATCHES)).items():
            _time_subject(report, f"{form}, {subject}", open_session, random_prompt, sparse)


def _time_subject(
    report: Report,
    title: str,
    open_session: Callable[[], Session],
    prompt_of: Callable[..., Prompt],
    folder: Path,
) -> None:
    from gpu_speed import time_session

    try:
        session = open_session()
        for batch in BATCHES:
            figures = time_session(session, prompt_of(folder, batch), LENGTHS)
            report.rows.append(Row("speed", f"{title}, batch {batch}", None, figures))
    except DllavaExportError as error:
        report.leave_out(f"speed of {title}: {error}")


if __name__ == "__main__":
    sys.exit(main())
