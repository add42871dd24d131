"""Everything about a build that is known before TensorRT is asked: shapes, sizes, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export import names
from dllava_export.backends.kv_plan import SPARE_ROWS, KVPlan, plan_kv_cache
from dllava_export.backends.trt.build.build_options import BuildOptions
from dllava_export.backends.trt.build.profile_shapes import (
    Bounds,
    ProfileSizes,
    profile_shapes,
)
from dllava_export.backends.trt.engine_config import (
    DECODE,
    DECODER_ENGINE,
    PREFILL,
    RECOMPUTE_ENGINE,
    VISUAL_ENGINE,
    ProfileShapes,
)
from dllava_export.bundles import layout
from dllava_export.bundles.graph_memory import weight_bytes
from dllava_export.bundles.manifest import Manifest
from dllava_export.errors import BundleError, SettingError
from dllava_export.reporting.byte_sizes import format_bytes

if TYPE_CHECKING:
    import onnx


__all__ = ["MAX_TOP_K", "BuildPlan", "EnginePlan", "load_structure", "plan_build"]

MAX_TOP_K = 3840
"""The most rows that TensorRT's TopK selects, and so the most that a selection can keep."""

_DEFAULT_TEXT_ROWS = 512
_OPT_TEXT_ROWS = 64
_NO_ROWS = (0, 0, 0)
_ONE_ROW = (1, 1, 1)

# Peak RSS of TensorRT-RTX 1.7.1 at 7B width, fp16, two profiles: 3.4 GiB for 4 layers (1.8 GiB of
# weights), 21.5 GiB for 32 layers (12.3 GiB).
_MEMORY_PER_WEIGHT_BYTE = 1.7
_BASE_MEMORY_BYTES = 768 << 20


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """One engine that will be built.

    Attributes:
        name: `decoder`, `visual` or `recompute`.
        graph: Its graph, relative to the bundle.
        weight_bytes: Bytes of the graph's weights.
        profiles: Profile name → input name → range.
    """

    name: str
    graph: str
    weight_bytes: int
    profiles: dict[str, dict[str, ProfileShapes]]


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """What will be built.

    Attributes:
        backend: `tensorrt` or `tensorrt-rtx`.
        precision: Of the bundle.
        max_batch_size: Samples at once.
        max_input_len: Rows that one run may feed per sample.
        kv: Cache buffers at `max_batch_size`.
        engines: In the order in which they are built.
    """

    backend: str
    precision: str
    max_batch_size: int
    max_input_len: int
    kv: KVPlan
    engines: tuple[EnginePlan, ...]

    @property
    def memory_bytes(self) -> int:
        """Estimate of the memory that the largest of the builds takes, in bytes."""
        largest = max(engine.weight_bytes for engine in self.engines)
        return int(_MEMORY_PER_WEIGHT_BYTE * largest) + _BASE_MEMORY_BYTES

    def to_json(self) -> dict[str, Any]:
        """Return the plan as values that `json.dumps` takes."""
        return {**dataclasses.asdict(self), "memory_bytes": self.memory_bytes}

    def to_text(self) -> str:
        """Return the plan as aligned plain text."""
        lines = [
            f"Engines for {self.backend}, {self.precision}, up to {self.max_batch_size} "
            f"samples of {self.max_input_len} rows",
            *(
                f"  {names.capacity(group.name):<15}  {self.kv.capacities[group.name]} rows, "
                f"{group.num_layers} layers, {format_bytes(self.kv.num_bytes(group))}"
                for group in self.kv.groups
            ),
            f"  memory to build  about {format_bytes(self.memory_bytes)}",
        ]
        for engine in self.engines:
            lines += [
                "",
                f"{engine.name}: {engine.graph}, {format_bytes(engine.weight_bytes)} weights",
            ]
            for profile, shapes in engine.profiles.items():
                lines += [f"  profile {profile}", *_shape_lines(shapes)]
        return "\n".join(lines)


def plan_build(folder: Path, manifest: Manifest, options: BuildOptions) -> BuildPlan:
    """Work out profiles, capacities and memory; TensorRT need not be installed.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        options: What is wanted.

    Raises:
        BundleError: If a graph cannot be read.
        SettingError: If the settings do not fit the model or each other.
    """
    max_input_len, capacity = _lengths(manifest, options)
    kv = _plan_caches(manifest, options.max_batch_size, max_input_len, capacity)
    graphs = _graphs(manifest)
    _check_overrides(manifest, graphs, options)
    capacities = {names.capacity(group): rows for group, rows in kv.capacities.items()}
    engines = []
    for engine, graph in graphs.items():
        inputs = manifest.tensors[graph]["inputs"]
        profiles = {
            profile: profile_shapes(profile, inputs, sizes, capacities, options.overrides)
            for profile, sizes in _profile_sizes(engine, manifest, max_input_len, kv).items()
        }
        num_bytes = weight_bytes(load_structure(folder / graph).graph.initializer)
        engines.append(EnginePlan(engine, graph, num_bytes, profiles))
    return BuildPlan(
        options.backend,
        str(manifest.precision),
        options.max_batch_size,
        max_input_len,
        kv,
        tuple(engines),
    )


def load_structure(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights.

    Raises:
        BundleError: If there is no such file, or it is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(
            f"{path} cannot be read as an ONNX model ({error}). Export the bundle again."
        ) from error


def _lengths(manifest: Manifest, options: BuildOptions) -> tuple[int, int]:
    """Return max_input_len and the rows of a cache that stores every row."""
    num_images = manifest.geometry.num_image_tokens
    capacity = options.max_kv_cache_capacity or manifest.max_position_embeddings + SPARE_ROWS
    top = MAX_TOP_K if not manifest.sparsity.is_dense else capacity
    room = max(capacity - SPARE_ROWS - num_images, 0)
    # A small context is left half to the prompt, half to the answer.
    default = num_images + min(_DEFAULT_TEXT_ROWS, (room + 1) // 2)
    length = options.max_input_len or min(default, top)
    if length > top:
        raise SettingError(
            f"max_input_len is {length}, expected at most {top}: TensorRT's TopK, which "
            f"selects the rows that stay, takes K up to {MAX_TOP_K}. Lower --max-input-len, or "
            "export a dense decoder (--policy none)."
        )
    if length > capacity - SPARE_ROWS:
        raise SettingError(
            f"max_kv_cache_capacity is {capacity}, expected at least {length + SPARE_ROWS}: "
            f"max_input_len {length} and a spare row. Raise --max-kv-cache-capacity or lower "
            "--max-input-len."
        )
    if length < num_images:
        raise SettingError(
            f"max_input_len is {length}, expected at least {num_images}: an image alone takes "
            "that many rows. Raise --max-input-len and, if need be, --max-kv-cache-capacity."
        )
    return length, capacity


def _num_kept(manifest: Manifest, num_rows: int) -> int:
    """Return how many of the rows of a prompt with one image go on from `sparse_layer`."""
    num_images = manifest.geometry.num_image_tokens
    return num_rows - num_images + manifest.sparsity.num_kept_image_tokens(num_images)


def _plan_caches(manifest: Manifest, batch: int, max_input_len: int, capacity: int) -> KVPlan:
    return plan_kv_cache(
        manifest.geometry,
        manifest.sparsity,
        manifest.precision,
        batch=batch,
        num_prompt=max_input_len,
        num_kept=_num_kept(manifest, max_input_len),
        num_new=capacity - SPARE_ROWS - max_input_len,
    )


def _graphs(manifest: Manifest) -> dict[str, str]:
    """Return engine name → graph, for what this bundle has."""
    known = {
        DECODER_ENGINE: f"{layout.LLM_FOLDER}/{layout.DECODER}",
        VISUAL_ENGINE: f"{layout.VISUAL_FOLDER}/{layout.VISUAL}",
        RECOMPUTE_ENGINE: f"{layout.LLM_FOLDER}/{layout.RECOMPUTE}",
    }
    return {name: graph for name, graph in known.items() if graph in manifest.tensors}


def _check_overrides(
    manifest: Manifest, graphs: Mapping[str, str], options: BuildOptions
) -> None:
    inputs = {
        entry["name"]: None
        for graph in graphs.values()
        for entry in manifest.tensors[graph]["inputs"]
    }
    unknown = sorted(options.overrides.names() - set(inputs))
    if unknown:
        raise SettingError(
            f"There is no input {unknown[0]!r} to give a shape; the graphs have "
            f"{', '.join(inputs)}."
        )


def _profile_sizes(
    engine: str, manifest: Manifest, max_input_len: int, kv: KVPlan
) -> dict[str, ProfileSizes]:
    """Return the sizes of each profile of an engine, by profile name."""
    num_images = manifest.geometry.num_image_tokens
    batch: Bounds = (1, kv.batch, kv.batch)
    if engine == VISUAL_ENGINE:
        return {engine: ProfileSizes(batch, _ONE_ROW, _ONE_ROW, _NO_ROWS)}
    image_rows: Bounds = (0, num_images, num_images)
    if engine == RECOMPUTE_ENGINE:
        longest = kv.capacities[names.FULL] - SPARE_ROWS
        if not manifest.sparsity.is_dense:
            longest = min(longest, MAX_TOP_K)
        opt = max_input_len
        kept: Bounds = (1, _num_kept(manifest, opt), longest)
        return {engine: ProfileSizes(batch, (1, opt, longest), kept, image_rows)}
    opt = min(num_images + _OPT_TEXT_ROWS, max_input_len)
    # A prompt without an image keeps all of its rows, as far as the sparse caches take them.
    most_kept = min(max_input_len, min(kv.capacities.values()) - SPARE_ROWS)
    kept = (1, _num_kept(manifest, opt), most_kept)
    return {
        PREFILL: ProfileSizes(batch, (1, opt, max_input_len), kept, image_rows),
        DECODE: ProfileSizes(batch, _ONE_ROW, _ONE_ROW, _NO_ROWS, has_fixed_rows=True),
    }


def _shape_lines(shapes: Mapping[str, ProfileShapes]) -> list[str]:
    """Return one line per input; caches of equal range share one."""
    groups: dict[ProfileShapes, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(shape, []).append(name)
    rows = []
    for shape, members in groups.items():
        for label in _labels(members):
            spelled = (f"[{'x'.join(map(str, s))}]" for s in (shape.min, shape.opt, shape.max))
            kind = " (values)" if shape.is_values else ""
            rows.append((label, "  ".join(spelled) + kind))
    width = max(len(label) for label, _ in rows)
    return [f"    {label:<{width}}  {text}" for label, text in rows]


def _labels(members: list[str]) -> list[str]:
    caches = [name for name in members if names.is_past(name)]
    others = [name for name in members if name not in caches]
    if not caches:
        return others
    return [*others, f"{caches[0]} to {caches[-1]}" if len(caches) > 1 else caches[0]]
