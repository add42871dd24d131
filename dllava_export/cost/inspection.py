"""What sparsification saves, by formula: rows per layer, FLOPs, bytes of KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dllava_export.bundles.layout import DECODER
from dllava_export.bundles.manifest import read_manifest
from dllava_export.cost.formulas import (
    ExactFlops,
    KVGroup,
    exact_flops,
    kv_bytes,
    paper_flops,
    rows_per_layer,
)
from dllava_export.geometry import Geometry
from dllava_export.precision import Precision
from dllava_export.reporting.byte_sizes import format_bytes
from dllava_export.reporting.comparison_table import (
    HEADING,
    Row,
    compare,
)
from dllava_export.reporting.resources import stage
from dllava_export.reporting.tables import aligned_lines
from dllava_export.sparsity import DENSE, Sparsity

__all__ = ["InspectionReport", "inspect_bundle", "inspect_geometry"]


@dataclasses.dataclass(frozen=True)
class InspectionReport:
    """A sparse decoder beside the dense one, for one sample with one image.

    Attributes:
        geometry: Sizes of the model.
        sparsity: What is pruned.
        precision: How values are stored.
        prompt_text_len: Text tokens of the prompt.
        output_len: Generated tokens.
        rows: Rows of each layer in prefill, (dense, sparse).
        paper: FLOPs of the prefill as the paper counts them, (dense, sparse).
        flops: The exact count, (dense, sparse).
        kv: KV cache groups, (dense, sparse).
        passes: The manifest's entries of the graph passes that made the bundle, in order.
    """

    geometry: Geometry
    sparsity: Sparsity
    precision: Precision
    prompt_text_len: int
    output_len: int
    rows: tuple[list[int], list[int]]
    paper: tuple[float, float]
    flops: tuple[ExactFlops, ExactFlops]
    kv: tuple[tuple[KVGroup, ...], tuple[KVGroup, ...]]
    passes: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as values that `json.dumps` takes. FLOPs and bytes are plain."""

        def side(index: int) -> dict[str, Any]:
            groups = [group.to_json() for group in self.kv[index]]
            return {
                "rows_per_layer": self.rows[index],
                "paper_prefill_flops": self.paper[index],
                "flops": dataclasses.asdict(self.flops[index]),
                "kv_cache": {"groups": groups, "bytes": self.kv_total(index)},
            }

        return {
            "geometry": dataclasses.asdict(self.geometry),
            "sparsity": dataclasses.asdict(self.sparsity),
            "precision": self.precision.to_json(),
            "num_kept_image_tokens": self._num_kept,
            "prompt_text_len": self.prompt_text_len,
            "output_len": self.output_len,
            "dense": side(0),
            "sparse": side(1),
            "passes": [dict(entry) for entry in self.passes],
        }

    def to_text(self) -> str:
        """Return the report as aligned plain text."""
        heading = [
            ("Model", self._describe_model()),
            ("Sparsity", self.describe_sparsity()),
            (
                "Request",
                f"{self.prompt_text_len} text tokens, {self.geometry.num_image_tokens} image "
                f"tokens, {self.output_len} generated tokens; one sample",
            ),
        ]
        lines = [f"{name:<10}{value}" for name, value in heading]
        lines += ["", *aligned_lines(self._comparisons())]
        if self.passes:
            width = max(len(_pass_name(entry)) for entry in self.passes)
            lines += ["", "Passes"]
            for number, entry in enumerate(self.passes, start=1):
                line = f"{number:>4}  {_pass_name(entry):<{width}}  {_parameters(entry)}"
                lines.append(line.rstrip())
        return "\n".join(lines)

    @property
    def _num_kept(self) -> int:
        return self.sparsity.num_kept_image_tokens(self.geometry.num_image_tokens)

    def kv_total(self, index: int) -> int:
        """Return the bytes of all groups; index 0 is dense, 1 sparse."""
        return sum(group.bytes for group in self.kv[index])

    def kv_bytes_per_layer(self, index: int) -> list[float]:
        """Return the bytes of each layer's cache; index 0 is dense, 1 sparse."""
        return [
            entry.bytes / entry.group.num_layers
            for entry in self.kv[index]
            for _ in range(entry.group.num_layers)
        ]

    def _describe_model(self) -> str:
        geometry = self.geometry
        return (
            f"{geometry.num_layers} layers, hidden size {geometry.hidden_size}, "
            f"{geometry.num_heads} heads and {geometry.num_kv_heads} KV heads of "
            f"{geometry.head_dim}, {self.precision.cache.num_bytes} bytes per value"
        )

    def describe_sparsity(self) -> str:
        """Return the sparsity in words: what is pruned, after which layer, at which ratio."""
        if self.sparsity.is_dense:
            return "none: a dense decoder"
        stored = "all generated tokens"
        if self.sparsity.has_keep_bit:
            stored = f"about {self.sparsity.output_text_keep_rate:.0%} of generated tokens"
        return (
            f"policy {self.sparsity.policy_text}; from layer {self.sparsity.sparse_layer} on "
            f"{self._num_kept} of {self.geometry.num_image_tokens} image tokens and {stored}"
        )

    def _comparisons(self) -> list[Row]:
        dense, sparse = self.flops
        table = [HEADING]
        groups = [entry.group for entry in self.kv[1]]
        for group in groups:
            dense_rows, sparse_rows = (side[group.first_layer] for side in self.rows)
            table.append(compare(f"prefill rows, {group.text}", dense_rows, sparse_rows, str))
        table += [
            compare("prefill FLOPs", dense.prefill, sparse.prefill, _engineering),
            compare("last decode step FLOPs", dense.decode_step, sparse.decode_step,
                    _engineering),
            compare("generation FLOPs", dense.generation, sparse.generation, _engineering),
            compare("prefill FLOPs, paper's formula (image rows)", *self.paper, _engineering),
        ]  # fmt: skip
        per_layer = [self.kv_bytes_per_layer(index) for index in (0, 1)]
        for group in groups:
            dense_bytes, sparse_bytes = (sum(side[group.layers]) for side in per_layer)
            name = f"KV cache, {group.text}"
            table.append(compare(name, dense_bytes, sparse_bytes, format_bytes))
        totals = self.kv_total(0), self.kv_total(1)
        table.append(compare("KV cache, total", *totals, format_bytes))
        return table


def inspect_geometry(
    geometry: Geometry,
    sparsity: Sparsity,
    precision: Precision,
    *,
    prompt_text_len: int = 64,
    output_len: int = 256,
    passes: Iterable[Mapping[str, Any]] = (),
) -> InspectionReport:
    """Compare a sparse decoder with the dense one of the same geometry.

    Args:
        geometry: Sizes of the model.
        sparsity: What is pruned.
        precision: How values are stored.
        prompt_text_len: Text tokens of the prompt.
        output_len: Generated tokens, at least 1.
        passes: Entries of the manifest, each with `name` and perhaps `parameters`.

    Raises:
        SettingError: If the settings do not fit the model.
    """
    settings = (DENSE, sparsity)
    rows = [rows_per_layer(geometry, setting, prompt_text_len) for setting in settings]
    paper = [
        paper_flops(geometry.hidden_size, rows_per_layer(geometry, setting, 0))
        for setting in settings
    ]
    flops = [exact_flops(geometry, item, prompt_text_len, output_len) for item in settings]
    kv = [
        kv_bytes(geometry, item, precision, prompt_text_len, output_len) for item in settings
    ]
    return InspectionReport(
        geometry=geometry,
        sparsity=sparsity,
        precision=precision,
        prompt_text_len=prompt_text_len,
        output_len=output_len,
        rows=(rows[0], rows[1]),
        paper=(paper[0], paper[1]),
        flops=(flops[0], flops[1]),
        kv=(kv[0], kv[1]),
        passes=tuple(passes),
    )


def inspect_bundle(
    folder: str | Path,
    *,
    prompt_text_len: int = 64,
    output_len: int = 256,
    num_image_tokens: int | None = None,
) -> InspectionReport:
    """Compare a bundle with its dense form.

    Args:
        folder: The bundle.
        prompt_text_len: Text tokens of the prompt.
        output_len: Generated tokens, at least 1.
        num_image_tokens: Image tokens of the prompt; the bundle's by default.

    Raises:
        BundleError: If the bundle is incomplete, changed, or of another schema version.
        SettingError: If the settings do not fit the model.
    """
    with stage("checking the bundle"):
        manifest = read_manifest(Path(folder))
    geometry = manifest.geometry
    if num_image_tokens is not None:
        geometry = dataclasses.replace(geometry, num_image_tokens=num_image_tokens)
    return inspect_geometry(
        geometry,
        manifest.sparsity,
        manifest.precision,
        prompt_text_len=prompt_text_len,
        output_len=output_len,
        passes=manifest.passes[DECODER],
    )


def _engineering(value: float) -> str:
    """Return four digits with a prefix: 2.488e12 becomes `2.488 T`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.99995 * factor:
            return f"{value / factor:#.4g} {prefix}"
    return f"{value:.0f}"


def _pass_name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name", "?"))


def _parameters(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in entry.get("parameters", {}).items())
