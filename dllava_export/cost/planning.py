"""What a bundle takes of a GPU's memory, and the largest batch that fits, by formula.

Of the memory of a GPU, at batch size n:

    weights             decoder, predictors, vision: once, exact
    KV cache            n * both groups as `kv_plan` makes them, exact
    activations         n * peak over the nodes of each graph, prefill: an estimate from above
    input and output    n * tensors that go in and out of the graphs, exact
    runtime             RUNTIME_BYTES, assumed

The token embeddings stay on the host. `ASSUMPTIONS` says what the estimate leaves out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dllava_export.backends.kv_plan import KVPlan, plan_kv_cache
from dllava_export.bundles.manifest import Manifest, read_manifest
from dllava_export.cost.graph_sizes import GraphSizes, Rows, graph_sizes, read_graphs
from dllava_export.errors import SettingError
from dllava_export.precision import FP32
from dllava_export.reporting.byte_sizes import format_bytes
from dllava_export.reporting.comparison_table import (
    HEADING,
    Row,
    compare,
)
from dllava_export.reporting.resources import stage
from dllava_export.reporting.tables import aligned_lines
from dllava_export.settings import check_whole_numbers
from dllava_export.sparsity import DENSE, Sparsity

__all__ = [
    "ASSUMPTIONS",
    "RUNTIME_BYTES",
    "MemoryEstimate",
    "MemoryPlan",
    "PlanRequest",
    "plan_memory",
]

RUNTIME_BYTES = 512 << 20
"""Assumed for the CUDA context, the code of kernels and the runtime's own workspace."""

ASSUMPTIONS = (
    "Each prompt has one image and the longest length; all samples generate all new tokens.",
    "Activations: each node writes a new buffer, freed behind its last reader. Runtimes fuse "
    "nodes and need less.",
    "Attention is fused: scores are not stored, except in the image predictor.",
    "Decoder and vision graph keep the memory of their activations at the same time.",
    f"CUDA context, kernels and workspace take {format_bytes(RUNTIME_BYTES)}. Not measured.",
)


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What to plan for.

    Attributes:
        gpu_memory: Bytes.
        max_input_len: Tokens of the longest prompt, those of its image included.
        max_new_tokens: Tokens generated at most.
        batch_size: Samples at once.
        image_tokens: Image tokens of a prompt; the bundle's where None.
    """

    gpu_memory: int
    max_input_len: int
    max_new_tokens: int
    batch_size: int = 1
    image_tokens: int | None = None

    def __post_init__(self) -> None:
        check_whole_numbers(
            self, 1, "gpu_memory", "max_input_len", "max_new_tokens", "batch_size"
        )
        check_whole_numbers(self, 0, "image_tokens")


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """GPU memory of a bundle, as it is or dense, in bytes.

    Attributes:
        kv_plan: Cache buffers of the batch.
        decoder_weights: The decoder's, without predictors.
        predictor_weights: In float32, as they compute.
        visual_weights: Tower and projector.
        decoder_activations: Of the batch, at the peak of the prefill.
        visual_activations: Of the batch.
        buffers: Inputs and outputs of the graphs for the batch, caches not counted.
        gpu_memory: What there is.
    """

    kv_plan: KVPlan
    decoder_weights: int
    predictor_weights: int
    visual_weights: int
    decoder_activations: int
    visual_activations: int
    buffers: int
    gpu_memory: int

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.decoder_weights + self.predictor_weights + self.visual_weights

    @property
    def fixed(self) -> int:
        """Bytes that do not grow with the batch."""
        return self.weights + RUNTIME_BYTES

    @property
    def kv_cache(self) -> int:
        """Bytes of all groups of the KV cache."""
        return self.kv_plan.total_bytes

    def group_bytes(self, name: str) -> int:
        """Return the bytes of a cache group; 0 where the decoder has no such group."""
        return sum(self.kv_plan.num_bytes(g) for g in self.kv_plan.groups if g.name == name)

    @property
    def activations(self) -> int:
        """Bytes between nodes, of both graphs."""
        return self.decoder_activations + self.visual_activations

    @property
    def per_sample(self) -> int:
        """Bytes that one more sample takes."""
        return (self.kv_cache + self.activations + self.buffers) // self.kv_plan.batch

    @property
    def total(self) -> int:
        """Bytes of the batch."""
        return self.fixed + self.per_sample * self.kv_plan.batch

    @property
    def largest_batch(self) -> int:
        """Samples that fit; 0 where not even one does."""
        return max((self.gpu_memory - self.fixed) // self.per_sample, 0)

    def to_json(self) -> dict[str, Any]:
        """Return values that `json.dumps` takes."""
        plan = self.kv_plan
        return {
            "cache_groups": [
                {
                    **dataclasses.asdict(group),
                    "capacity": plan.capacities[group.name],
                    "bytes": plan.num_bytes(group),
                }
                for group in plan.groups
            ],
            "bytes": {
                "decoder_weights": self.decoder_weights,
                "predictor_weights": self.predictor_weights,
                "visual_weights": self.visual_weights,
                "kv_cache": plan.total_bytes,
                "decoder_activations": self.decoder_activations,
                "visual_activations": self.visual_activations,
                "buffers": self.buffers,
                "runtime": RUNTIME_BYTES,
                "total": self.total,
                "per_sample": self.per_sample,
            },
            "fits": self.total <= self.gpu_memory,
            "largest_batch": self.largest_batch,
        }


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """A bundle on a GPU, beside its dense form.

    Attributes:
        folder: The bundle.
        sparsity: What is pruned.
        request: What was asked, its `num_image_tokens` filled in.
        embedding: Bytes of token embeddings on the host.
        stored_scores: Bytes that the attention scores of one sample's prefill would take in one
            full layer, where a backend has no fused attention. Not in the totals.
        dense: Nothing pruned.
        sparse: The bundle.
    """

    folder: Path
    sparsity: Sparsity
    request: PlanRequest
    embedding: int
    stored_scores: int
    dense: MemoryEstimate
    sparse: MemoryEstimate

    def to_json(self) -> dict[str, Any]:
        """Return the plan as values that `json.dumps` takes; sizes in bytes."""
        return {
            "bundle": str(self.folder),
            "sparsity": dataclasses.asdict(self.sparsity),
            "request": dataclasses.asdict(self.request),
            "dense": self.dense.to_json(),
            "sparse": self.sparse.to_json(),
            "host_bytes": {"embedding": self.embedding},
            "stored_scores_bytes": self.stored_scores,
            "assumptions": list(ASSUMPTIONS),
        }

    def to_text(self) -> str:
        """Return the plan as aligned plain text."""
        request = self.request
        lines = [
            f"Request   {request.max_input_len} prompt tokens, {request.image_tokens} of "
            f"them of an image, and {request.max_new_tokens} new ones; batch "
            f"{request.batch_size}",
            f"GPU       {format_bytes(request.gpu_memory)}",
            f"Host      {format_bytes(self.embedding)} of token embeddings",
            "",
            *aligned_lines(self._rows()),
            "",
            self._verdict(),
            "",
            "Assumed",
            *(f"  {line}" for line in ASSUMPTIONS),
            f"  Without fused attention: {format_bytes(self.stored_scores)} more per sample.",
        ]
        return "\n".join(lines)

    def _rows(self) -> list[Row]:
        dense, sparse = self.dense, self.sparse
        plan = sparse.kv_plan
        (every_layer,) = dense.kv_plan.groups
        dense_rows = dense.kv_plan.capacities[every_layer.name]
        layer_bytes = dense.kv_plan.total_bytes // every_layer.num_layers
        rows = [HEADING]
        for group in plan.groups:
            capacity = plan.capacities[group.name]
            rows.append(compare(f"cache rows, {group.text}", dense_rows, capacity, str))
        parts = [
            ("decoder weights", dense.decoder_weights, sparse.decoder_weights),
            ("predictor weights", dense.predictor_weights, sparse.predictor_weights),
            ("vision weights", dense.visual_weights, sparse.visual_weights),
        ]
        for group in plan.groups:
            dense_bytes = group.num_layers * layer_bytes
            parts.append((f"KV cache, {group.text}", dense_bytes, plan.num_bytes(group)))
        parts += [
            ("decoder activations", dense.decoder_activations, sparse.decoder_activations),
            ("vision activations", dense.visual_activations, sparse.visual_activations),
            ("inputs and outputs", dense.buffers, sparse.buffers),
            ("CUDA context, kernels", RUNTIME_BYTES, RUNTIME_BYTES),
            (f"in all, batch {self.request.batch_size}", dense.total, sparse.total),
            ("each further sample", dense.per_sample, sparse.per_sample),
        ]
        rows += [compare(*part, format_bytes) for part in parts if any(part[1:])]
        rows.append(compare("largest batch", dense.largest_batch, sparse.largest_batch, str))
        return rows

    def _verdict(self) -> str:
        sparse, memory = self.sparse, format_bytes(self.request.gpu_memory)
        batch = self.request.batch_size
        if sparse.total <= self.request.gpu_memory:
            return (
                f"A batch of {batch} fits in {memory}, the largest is {sparse.largest_batch}."
            )
        return (
            f"A batch of {batch} does not fit: {format_bytes(sparse.total)} of {memory}. The "
            f"largest is {sparse.largest_batch}."
        )


def plan_memory(folder: str | Path, request: PlanRequest) -> MemoryPlan:
    """Plan a bundle on a GPU, beside its dense form. Nothing is run.

    Args:
        folder: The bundle.
        request: What to plan for.

    Raises:
        BundleError: If the bundle is incomplete, changed, or of another schema version.
        UnsupportedModelError: If shapes of a graph are not known.
        SettingError: If the lengths do not fit the model, or the memory not one sample.
    """
    folder = Path(folder)
    with stage("checking the bundle"):
        manifest = read_manifest(folder)
    geometry = manifest.geometry
    if request.image_tokens is None:
        request = dataclasses.replace(request, image_tokens=geometry.num_image_tokens)
    num_image = _checked_image_tokens(manifest, request)
    num_kept = request.max_input_len - num_image
    num_kept += manifest.sparsity.num_kept_image_tokens(num_image)

    with stage("reading graphs"):
        graphs = read_graphs(folder, manifest)

    def estimate(sparsity: Sparsity, rows: Rows) -> MemoryEstimate:
        plan = plan_kv_cache(
            geometry,
            sparsity,
            manifest.precision,
            batch=request.batch_size,
            num_prompt=rows.prompt,
            num_kept=rows.kept,
            num_new=request.max_new_tokens,
        )
        return _estimate(
            graph_sizes(graphs, plan, rows),
            plan,
            request.gpu_memory,
            has_predictors=not sparsity.is_dense,
        )

    num_rows = request.max_input_len
    dense = estimate(DENSE, Rows(num_rows, num_rows, 0))
    scored = 0 if manifest.sparsity.is_dense else num_image
    sparse = estimate(manifest.sparsity, Rows(num_rows, num_kept, scored))
    _check_room(folder, manifest, sparse)
    total_len = num_rows + request.max_new_tokens
    return MemoryPlan(
        folder=folder,
        sparsity=manifest.sparsity,
        request=request,
        embedding=graphs.embedding_bytes,
        stored_scores=geometry.num_heads
        * num_rows
        * total_len
        * manifest.precision.activations.num_bytes,
        dense=dense,
        sparse=sparse,
    )


def _estimate(
    sizes: GraphSizes, plan: KVPlan, gpu_memory: int, *, has_predictors: bool
) -> MemoryEstimate:
    batch = plan.batch
    return MemoryEstimate(
        kv_plan=plan,
        decoder_weights=sizes.decoder_weights,
        predictor_weights=sizes.predictor_weights if has_predictors else 0,
        visual_weights=sizes.visual_weights,
        decoder_activations=batch * sizes.decoder_activations,
        visual_activations=batch * sizes.visual_activations,
        buffers=batch * sizes.buffers,
        gpu_memory=gpu_memory,
    )


def _checked_image_tokens(manifest: Manifest, request: PlanRequest) -> int:
    num_image, num_input = request.image_tokens, request.max_input_len
    assert num_image is not None  # filled in by plan_memory
    if num_image and num_input <= num_image:
        raise SettingError(
            f"max_input_len counts the image too, whose tokens are {num_image}; expected at "
            f"least {num_image + 1}, got {num_input}. Add the {num_image} image tokens to the "
            "length of the text."
        )
    longest = num_input + request.max_new_tokens
    if longest > manifest.max_position_embeddings:
        raise SettingError(
            f"max_input_len {num_input} and max_new_tokens {request.max_new_tokens} are "
            f"{longest} tokens together; the model was made for at most "
            f"{manifest.max_position_embeddings}. Take fewer."
        )
    return num_image


def _check_room(folder: Path, manifest: Manifest, sparse: MemoryEstimate) -> None:
    """Refuse a memory in which the bundle cannot run at all."""
    memory, fixed = sparse.gpu_memory, sparse.fixed
    runtime = format_bytes(RUNTIME_BYTES)
    if fixed >= memory:
        remedy = (
            "" if manifest.precision.weights != FP32 else ", or export with --precision fp16"
        )
        raise SettingError(
            f"gpu_memory is {format_bytes(memory)}, but the weights of {folder} take "
            f"{format_bytes(sparse.weights)} (decoder {format_bytes(sparse.decoder_weights)}, "
            f"predictors {format_bytes(sparse.predictor_weights)}, vision "
            f"{format_bytes(sparse.visual_weights)}) in {manifest.precision}, and the runtime "
            f"about {runtime}. Take a GPU with more than {format_bytes(fixed)}{remedy}."
        )
    if not sparse.largest_batch:
        needed = fixed + sparse.per_sample
        raise SettingError(
            f"gpu_memory is {format_bytes(memory)}, but one sample needs "
            f"{format_bytes(needed)}: {format_bytes(sparse.weights)} of weights, about {runtime} "
            f"of runtime, and {format_bytes(sparse.per_sample)} of KV cache and activations. "
            f"Take a GPU with {format_bytes(needed)}, or a smaller max_input_len or "
            "max_new_tokens."
        )
