"""What sparsification saves, by formula: rows per layer, FLOPs, bytes of KV cache."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dllava_export.byte_sizes import byte_unit, format_bytes
from dllava_export.comparison_table import HEADING, Row, compare, layer_spans, table_lines
from dllava_export.output_files import check_plot_format, save_plot
from dllava_export.sparsity import Sparsity

__all__ = [
    "ExactFlops",
    "Geometry",
    "InspectionReport",
    "KVGroup",
    "PredictorGeometry",
    "exact_flops",
    "inspect_geometry",
    "kv_bytes",
    "paper_flops",
    "plot_report",
    "rows_per_layer",
]

_DENSE = Sparsity(policy="none")


@dataclasses.dataclass(frozen=True)
class PredictorGeometry:
    """Sizes of the predictors; the output-text predictor has `d_model` only.

    Attributes:
        d_model: Width behind the first linear layer.
        nhead: Attention heads of the image predictor.
        dim_feedforward: MLP width of the image predictor's blocks.
        num_layers: Number of the image predictor's blocks.
    """

    d_model: int = 512
    nhead: int = 8
    dim_feedforward: int = 2048
    num_layers: int = 2


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder, all that the counts of this module depend on.

    Attributes:
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab_size: Rows of the language model head.
        num_image_tokens: Rows that one image puts into the sequence.
        bytes_per_value: Bytes of one KV cache value: 2 for float16, 4 for float32.
        predictor: Sizes of the predictors; None for policies that have none.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_image_tokens: int
    bytes_per_value: int
    predictor: PredictorGeometry | None = None


@dataclasses.dataclass(frozen=True)
class ExactFlops:
    """FLOPs of one sample; a multiply-add counts 2.

    Attributes:
        prefill: The run over image and prompt.
        decode_step: The last decode step; 0 where there is none.
        generation: The prefill and all decode steps.
    """

    prefill: float
    decode_step: float
    generation: float


@dataclasses.dataclass(frozen=True)
class KVGroup:
    """The KV cache of layers that store the same rows.

    Attributes:
        name: `full` below `sparse_layer`, `sparse` from it on.
        num_layers: Layers in the group.
        rows: Rows in each layer at the end of the generation.
        bytes: Bytes of keys and values of one sample in all layers of the group.
    """

    name: str
    num_layers: int
    rows: int
    bytes: int


def rows_per_layer(geometry: Geometry, sparsity: Sparsity, prompt_text_len: int) -> list[int]:
    """Return how many rows each decoder layer computes in the prefill of one sample.

    P = prompt_text_len + num_image_tokens below `sparse_layer`, and
    P - num_image_tokens + num_kept from it on.

    Raises:
        ValueError: If `sparse_layer` is not a layer of the model, or no image token or more
            than all would be kept.
    """
    num_image_tokens = geometry.num_image_tokens
    num_kept = sparsity.num_kept_image_tokens(num_image_tokens)
    num_full = _num_full_layers(geometry, sparsity)
    return [prompt_text_len + num_image_tokens] * num_full + [prompt_text_len + num_kept] * (
        geometry.num_layers - num_full
    )


def paper_flops(hidden_size: int, rows_by_layer: Sequence[int]) -> float:
    """Return FLOPs as the Dynamic-LLaVA paper counts them.

    Sum over layers of 32 * N * C^2 + 4 * N^2 * C, with C the hidden size and N the layer's
    rows. The paper's prefill figures count image tokens only, its decoding figures output
    tokens only; 32 * C^2 is above the linear layers of LLaMA (about 24.1 * C^2). For
    comparison with published tables; `exact_flops` is the real count.

    Args:
        hidden_size: Width of the residual stream.
        rows_by_layer: Rows of each decoder layer.

    Source: Dynamic-LLaVA (arXiv:2412.00876), equation 13.
    """
    return float(
        sum(32 * rows * hidden_size**2 + 4 * rows**2 * hidden_size for rows in rows_by_layer)
    )


def exact_flops(
    geometry: Geometry, sparsity: Sparsity, prompt_text_len: int, output_len: int
) -> ExactFlops:
    """Count the FLOPs of one sample with one image; a multiply-add counts 2.

    Counted, per decoder layer and row: the projections q, k, v, o (with `num_kv_heads`), gate,
    up and down; attention scores and weighted values over the rows that are visible (causal:
    row i attends to i + 1 rows, itself included). Once per run: the language model head, on
    one row. With policy `predictor`: the image predictor on all image tokens in the prefill
    (its linear layers and its full attention), and the output-text predictor on each token
    that is fed in decode, if generated tokens are pruned.

    Not counted: embeddings, norms, rotary embedding, softmax, activations, biases, residual
    additions, top-k and gathers; the vision tower and the projector.

    The prefill yields the first token, so `output_len` tokens take output_len - 1 decode
    steps. In decode step t (from 1) a layer below `sparse_layer` attends to P + t rows. From
    `sparse_layer` on, a step attends to the kept prompt rows, itself, and the earlier
    generated tokens that were stored: output_text_keep_rate * (t - 1) of them, in expectation.

    Args:
        geometry: Sizes of the model.
        sparsity: What is pruned.
        prompt_text_len: Text tokens of the prompt.
        output_len: Generated tokens, at least 1.

    Raises:
        ValueError: If `output_len` is below 1, the policy is `predictor` and the geometry has
            no predictor, or the settings do not fit the model.
    """
    if output_len < 1:
        raise ValueError(f"output_len must be at least 1, got {output_len}.")
    rows = rows_per_layer(geometry, sparsity, prompt_text_len)
    has_predictor = sparsity.policy == "predictor"
    if has_predictor and geometry.predictor is None:
        raise ValueError(
            "policy is 'predictor', but the geometry has no predictor; expected its sizes. "
            "Pass predictor=PredictorGeometry(...)."
        )
    linear = _linear_flops_per_row(geometry)
    attention = 4 * geometry.num_heads * geometry.head_dim  # per pair of rows
    head = 2 * geometry.hidden_size * geometry.vocab_size
    prefill = head + sum(n * linear + n * (n + 1) // 2 * attention for n in rows)
    step_fixed = head + geometry.num_layers * linear
    if has_predictor:
        prefill += _image_predictor_flops(geometry)
        if sparsity.has_keep_bit:
            step_fixed += _text_predictor_flops(geometry)

    num_steps = output_len - 1
    num_full = _num_full_layers(geometry, sparsity)
    num_sparse = geometry.num_layers - num_full
    rate = sparsity.output_text_keep_rate if sparsity.has_keep_bit else 1.0

    def attended(step: float) -> float:
        """Sum over layers of the rows that are visible in decode step `step`."""
        full = num_full * (rows[0] + step)
        return full + num_sparse * (rows[-1] + rate * (step - 1) + 1)

    decode_step = step_fixed + attention * attended(num_steps) if num_steps else 0.0
    # The attended rows grow by the same amount in each step: their mean is the middle one.
    middle = (num_steps + 1) / 2
    decode = num_steps * (step_fixed + attention * attended(middle))
    return ExactFlops(float(prefill), float(decode_step), float(prefill + decode))


def kv_bytes(
    geometry: Geometry, sparsity: Sparsity, prompt_text_len: int, output_len: int
) -> tuple[KVGroup, KVGroup]:
    """Return the expected KV cache of one sample after `output_len` generated tokens.

    Rows of the full group: P + output_len. Rows of the sparse group: the kept prompt rows
    + ceil(output_text_keep_rate * output_len), or all generated tokens where none are pruned.
    What a run allocates is a little more: capacities have a reserve.

    Args:
        geometry: Sizes of the model.
        sparsity: What is pruned.
        prompt_text_len: Text tokens of the prompt.
        output_len: Generated tokens.

    Returns:
        The full and the sparse group. Of a dense decoder all layers are in the full group.

    Raises:
        ValueError: If the settings do not fit the model.
    """
    rows = rows_per_layer(geometry, sparsity, prompt_text_len)
    num_full = _num_full_layers(geometry, sparsity)
    stored = output_len
    if sparsity.has_keep_bit:
        stored = math.ceil(sparsity.output_text_keep_rate * output_len)
    row_bytes = 2 * geometry.num_kv_heads * geometry.head_dim * geometry.bytes_per_value

    def group(name: str, num_layers: int, num_rows: int) -> KVGroup:
        num_rows = num_rows if num_layers else 0
        return KVGroup(name, num_layers, num_rows, num_layers * num_rows * row_bytes)

    return (
        group("full", num_full, rows[0] + output_len),
        group("sparse", geometry.num_layers - num_full, rows[-1] + stored),
    )


def _num_full_layers(geometry: Geometry, sparsity: Sparsity) -> int:
    if sparsity.is_dense:
        return geometry.num_layers
    if sparsity.sparse_layer >= geometry.num_layers:
        raise ValueError(
            f"sparse_layer must be below the {geometry.num_layers} layers of the model, got "
            f"{sparsity.sparse_layer}."
        )
    return sparsity.sparse_layer


def _linear_flops_per_row(geometry: Geometry) -> int:
    query = geometry.num_heads * geometry.head_dim
    key = geometry.num_kv_heads * geometry.head_dim
    attention = 2 * geometry.hidden_size * (query + key)  # q and o, k and v
    mlp = 3 * geometry.hidden_size * geometry.intermediate_size  # gate, up, down
    return 2 * (attention + mlp)


def _output_mlp_macs(predictor: PredictorGeometry) -> int:
    widths = (predictor.d_model, predictor.d_model // 2, predictor.d_model // 4, 2)
    return sum(a * b for a, b in itertools.pairwise(widths))


def _image_predictor_flops(geometry: Geometry) -> int:
    predictor = geometry.predictor
    assert predictor is not None
    rows, width = geometry.num_image_tokens, predictor.d_model
    # qkv and output projection, MLP; then scores and values over all pairs of rows.
    block_row = 4 * width**2 + 2 * width * predictor.dim_feedforward
    block = rows * block_row + 2 * rows**2 * width
    ends = rows * (geometry.hidden_size * width + _output_mlp_macs(predictor))
    return 2 * (ends + predictor.num_layers * block)


def _text_predictor_flops(geometry: Geometry) -> int:
    predictor = geometry.predictor
    assert predictor is not None
    return 2 * (geometry.hidden_size * predictor.d_model + _output_mlp_macs(predictor))


@dataclasses.dataclass(frozen=True)
class InspectionReport:
    """A sparse decoder beside the dense one, for one sample with one image.

    Attributes:
        geometry: Sizes of the model.
        sparsity: What is pruned.
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
    prompt_text_len: int
    output_len: int
    rows: tuple[list[int], list[int]]
    paper: tuple[float, float]
    flops: tuple[ExactFlops, ExactFlops]
    kv: tuple[tuple[KVGroup, KVGroup], tuple[KVGroup, KVGroup]]
    passes: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as values that `json.dumps` takes. FLOPs and bytes are plain."""

        def side(index: int) -> dict[str, Any]:
            groups = [dataclasses.asdict(group) for group in self.kv[index]]
            return {
                "rows_per_layer": self.rows[index],
                "paper_prefill_flops": self.paper[index],
                "flops": dataclasses.asdict(self.flops[index]),
                "kv_cache": {"groups": groups, "bytes": self._kv_total(index)},
            }

        return {
            "geometry": dataclasses.asdict(self.geometry),
            "sparsity": dataclasses.asdict(self.sparsity),
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
            ("Sparsity", self._describe_sparsity()),
            (
                "Request",
                f"{self.prompt_text_len} text tokens, {self.geometry.num_image_tokens} image "
                f"tokens, {self.output_len} generated tokens; one sample",
            ),
        ]
        lines = [f"{name:<10}{value}" for name, value in heading]
        lines += ["", *table_lines(self._comparisons())]
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

    def _kv_total(self, index: int) -> int:
        return sum(group.bytes for group in self.kv[index])

    def _kv_bytes_per_layer(self, index: int) -> list[float]:
        return [
            group.bytes / group.num_layers
            for group in self.kv[index]
            for _ in range(group.num_layers)
        ]

    def _describe_model(self) -> str:
        geometry = self.geometry
        return (
            f"{geometry.num_layers} layers, hidden size {geometry.hidden_size}, "
            f"{geometry.num_heads} heads and {geometry.num_kv_heads} KV heads of "
            f"{geometry.head_dim}, {geometry.bytes_per_value} bytes per value"
        )

    def _describe_sparsity(self) -> str:
        if self.sparsity.is_dense:
            return "none: a dense decoder"
        stored = "all generated tokens"
        if self.sparsity.has_keep_bit:
            stored = f"about {self.sparsity.output_text_keep_rate:.0%} of generated tokens"
        return (
            f"policy {self.sparsity.policy}; from layer {self.sparsity.sparse_layer} on "
            f"{self._num_kept} of {self.geometry.num_image_tokens} image tokens and {stored}"
        )

    def _comparisons(self) -> list[Row]:
        dense, sparse = self.flops
        table = [HEADING]
        spans = layer_spans(group.num_layers for group in self.kv[1])
        for first, last in spans:
            name = f"prefill rows, layers {first} to {last}"
            table.append(compare(name, self.rows[0][first], self.rows[1][first], str))
        table += [
            compare("prefill FLOPs", dense.prefill, sparse.prefill, _engineering),
            compare("last decode step FLOPs", dense.decode_step, sparse.decode_step,
                    _engineering),
            compare("generation FLOPs", dense.generation, sparse.generation, _engineering),
            compare("prefill FLOPs, paper's formula (image rows)", *self.paper, _engineering),
        ]  # fmt: skip
        per_layer = [self._kv_bytes_per_layer(index) for index in (0, 1)]
        for first, last in spans:
            name = f"KV cache, layers {first} to {last}"
            dense_bytes, sparse_bytes = (sum(side[first : last + 1]) for side in per_layer)
            table.append(compare(name, dense_bytes, sparse_bytes, format_bytes))
        totals = self._kv_total(0), self._kv_total(1)
        table.append(compare("KV cache, total", *totals, format_bytes))
        return table


def inspect_geometry(
    geometry: Geometry,
    sparsity: Sparsity,
    *,
    prompt_text_len: int = 64,
    output_len: int = 256,
    passes: Iterable[Mapping[str, Any]] = (),
) -> InspectionReport:
    """Compare a sparse decoder with the dense one of the same geometry.

    Args:
        geometry: Sizes of the model.
        sparsity: What is pruned.
        prompt_text_len: Text tokens of the prompt.
        output_len: Generated tokens, at least 1.
        passes: Entries of the manifest, each with `name` and perhaps `parameters`.

    Raises:
        ValueError: If the settings do not fit the model.
    """
    settings = (_DENSE, sparsity)
    rows = [rows_per_layer(geometry, setting, prompt_text_len) for setting in settings]
    paper = [
        paper_flops(geometry.hidden_size, rows_per_layer(geometry, setting, 0))
        for setting in settings
    ]
    flops = [exact_flops(geometry, item, prompt_text_len, output_len) for item in settings]
    kv = [kv_bytes(geometry, item, prompt_text_len, output_len) for item in settings]
    return InspectionReport(
        geometry=geometry,
        sparsity=sparsity,
        prompt_text_len=prompt_text_len,
        output_len=output_len,
        rows=(rows[0], rows[1]),
        paper=(paper[0], paper[1]),
        flops=(flops[0], flops[1]),
        kv=(kv[0], kv[1]),
        passes=tuple(passes),
    )


def plot_report(report: InspectionReport, path: str | os.PathLike[str]) -> None:
    """Draw rows and KV cache per decoder layer, dense beside sparse.

    The file appears under its name only when it is complete.

    Args:
        report: What to draw.
        path: Where to; the suffix .png, .svg or .pdf gives the format.

    Raises:
        ValueError: If the suffix is another.
    """
    check_plot_format(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    rows_axes, kv_axes = figure.subplots(1, 2)
    _draw_layers(rows_axes, report.rows)
    rows_axes.set_title("Prefill", loc="left", fontweight="bold")
    rows_axes.set_ylabel("rows")
    per_layer = [report._kv_bytes_per_layer(index) for index in (0, 1)]
    unit, size = byte_unit(max(*per_layer[0], *per_layer[1]))
    _draw_layers(kv_axes, [[value / size for value in side] for side in per_layer])
    kv_axes.set_title(
        f"KV cache after {report.output_len} generated tokens", loc="left", fontweight="bold"
    )
    kv_axes.set_ylabel(f"{unit} per layer")
    totals = [report._kv_total(index) for index in (0, 1)]
    _add_legend(rows_axes, [f"{sum(rows):,} rows in all" for rows in report.rows])
    _add_legend(kv_axes, [f"{format_bytes(total)} in all" for total in totals])
    figure.suptitle(_plot_title(report), x=0.01, ha="left", fontsize=10, color="0.3")
    save_plot(figure, path)


def _draw_layers(axes: Any, sides: Sequence[Sequence[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = range(len(sides[0]))
    axes.bar(layers, sides[0], width=0.86, color="#d9dce1")
    axes.bar(layers, sides[1], width=0.86, color="#2a6fbb")
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylim(0, 1.05 * max(*sides[0], *sides[1]))
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color="0.5")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.92")


def _add_legend(axes: Any, totals: Sequence[str]) -> None:
    labels = [
        f"{name}: {total}" for name, total in zip(("dense", "sparse"), totals, strict=True)
    ]
    axes.legend(
        axes.containers,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=2,
        frameon=False,
    )


def _plot_title(report: InspectionReport) -> str:
    return (
        f"{report.prompt_text_len} text tokens, one image; "
        f"{report._describe_sparsity().replace('; ', ', ')}"
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
