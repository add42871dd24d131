"""Measure checkpoints on mosaics of unseen digits, and write the tables of `results/`.

    python measure.py OUT

Bundles of all policies answer the same questions, greedily, in ONNX Runtime in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from mosaic_data import write_conversations
from tqdm import tqdm

import dllava_export
from dllava_export.benchmark.machine import machine_line
from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.evaluation.evaluate import evaluate_bundles
from dllava_export.evaluation.report import EvaluationReport
from dllava_export.evaluation.settings import EvaluationSettings
from dllava_export.exporting.exporter import export_checkpoint
from dllava_export.exporting.options import SparsityOptions
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.image_sources import read_image
from dllava_export.reporting.output_files import write_text

__all__ = ["Measurement", "digit_patches_kept", "export_all", "measure"]

LONG_KIND = "describe"
_SEED = 97  # of mosaics that training never draws: their digits are of the test split
_POLICIES = ("random", "uniform", "norm")
_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the tables hold.

    Attributes:
        cached: Answers with KV cache: `dense`, `sparse`, the sparse weights with other policies.
        recomputed: Answers of `sparse` without a cache.
        digit_patches_kept: Share of patches with ink that stay, mean over mosaics, by bundle.
    """

    cached: EvaluationReport
    recomputed: EvaluationReport
    digit_patches_kept: dict[str, float]

    def short_and_long(self) -> dict[str, tuple[float, float]]:
        """Return accuracy over all short questions and over the long one, by bundle."""
        results = {result.name: result for result in self.cached.results}
        results["sparse, no KV cache"] = self.recomputed.results[0]
        found = {}
        for name, result in results.items():
            right = {True: [], False: []}
            for answer in result.answers:
                right[answer.question.type == LONG_KIND].append(answer.is_correct)
            found[name] = (float(np.mean(right[False])), float(np.mean(right[True])))
        return found

    def to_markdown(self) -> str:
        """Return all tables, with date and machine."""
        lines = [
            "# Digit mosaic: results",
            "",
            f"{machine_line()}, `python measure.py`, one thread for each bundle.",
            "",
            "| | short questions | long question | digit patches kept |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, shares in self.short_and_long().items():
            kept = self.digit_patches_kept[name.removesuffix(", no KV cache")]
            cells = " | ".join(f"{100 * share:.1f} %" for share in (*shares, kept))
            lines.append(f"| {name} | {cells} |")
        lines += ["", self.cached.to_markdown(), self.recomputed.to_markdown()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Return the tables as values; single answers are left out."""
        reports = {"with KV cache": self.cached, "without KV cache": self.recomputed}
        content = {name: report.to_json() for name, report in reports.items()}
        for report in content.values():
            report["data"] = Path(report["data"]).name
            for result in report["bundles"]:
                del result["answers"]
                result["path"] = Path(result["path"]).name
        return {**content, "digit_patches_kept": self.digit_patches_kept}


def export_all(dense: Path, sparse: Path, out: Path) -> list[Path]:
    """Write the bundles that are compared, those that are there already excepted."""
    wanted = {"dense": (dense, SparsityOptions(policy="none")), "sparse": (sparse, None)}
    wanted["sparse_unpruned"] = (sparse, SparsityOptions(policy="none"))
    for policy in _POLICIES:
        wanted[policy] = (sparse, SparsityOptions(policy=policy))
    folders = []
    for name, (checkpoint, options) in wanted.items():
        folders.append(out / name)
        if not (out / name / "dllava_export.json").is_file():
            export_checkpoint(
                read_checkpoint(checkpoint), out / name, options, precision="fp32"
            )
    return folders


def digit_patches_kept(data: Path, folder: Path) -> float:
    """Return the share of patches with ink that the image selection keeps, mean over mosaics."""
    session = dllava_export.load(folder, num_threads=1)
    if session.manifest.sparsity.is_dense:
        return 1.0
    prompt = np.array([[session.tokenizer.encode("")[0], IMAGE_PLACEHOLDER_ID]])
    records = {record["image"]: record for record in json.loads(data.read_text())}
    shares = []
    for name, record in records.items():
        pixels = session.image_processor([read_image(data.parent / name)])
        result = session.prefill(prompt, pixels, max_new_tokens=1)
        shares.append(np.isin(record["digit_patches"], result.kept_image_indices[0]).mean())
    return float(np.mean(shares))


def measure(dense: Path, sparse: Path, out: Path, num_mosaics: int) -> Measurement:
    """Export, ask, count: a bundle per core at a time, since the model is too small for more."""
    data = write_conversations(out / "questions", "test", _SEED, num_mosaics)
    folders = export_all(dense, sparse, out)
    jobs = [(out / "sparse", "recompute"), *((folder, "cache") for folder in folders)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        asked = pool.map(functools.partial(_ask, data), *zip(*jobs, strict=True))
        kept = pool.map(functools.partial(digit_patches_kept, data), folders)
        recomputed, *cached = tqdm(asked, "bundles", total=len(jobs))
        shares = {folder.name: share for folder, share in zip(folders, kept, strict=True)}
    together = tuple(report.results[0] for report in cached)
    return Measurement(dataclasses.replace(cached[0], results=together), recomputed, shares)


def _ask(data: Path, folder: Path, mode: str) -> EvaluationReport:
    settings = EvaluationSettings(batch_size=_BATCH_SIZE, mode=mode)
    return evaluate_bundles([folder], data, settings)


def main() -> None:
    """Measure, write `results.md` and `results.json`, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for bundles, questions and tables")
    here = Path(__file__).parent
    parser.add_argument("--dense", type=Path, default=here / "checkpoints" / "dense")
    parser.add_argument("--sparse", type=Path, default=here / "checkpoints" / "sparse")
    parser.add_argument("--mosaics", type=int, default=500, help="how many; default 500")
    arguments = parser.parse_args()
    found = measure(arguments.dense, arguments.sparse, arguments.out, arguments.mosaics)
    text = found.to_markdown()
    write_text(arguments.out / "results.md", text)
    write_text(arguments.out / "results.json", json.dumps(found.to_json(), indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
