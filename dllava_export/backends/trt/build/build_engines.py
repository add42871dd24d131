"""Build TensorRT engines from a bundle.

    manifest ─► plan ─► for each graph: lower ─► parse ─► two profiles ─► build ─► .engine
                                                                               └► config.json

Engines are written to a temporary folder that takes the place of the old one when all are
there. Only the recompute engine may be missing: some graphs need what a backend lacks.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from dllava_export.backends.trt.build.build_options import BuildOptions
from dllava_export.backends.trt.build.build_plan import (
    BuildPlan,
    EnginePlan,
    load_structure,
    plan_build,
)
from dllava_export.backends.trt.build.build_progress import progress_monitor
from dllava_export.backends.trt.build.build_report import BuildReport
from dllava_export.backends.trt.build.builder_settings import BuilderSettings
from dllava_export.backends.trt.build.machine_memory import available_bytes
from dllava_export.backends.trt.build.node_places import NodePlaces
from dllava_export.backends.trt.build.onnx_to_network import (
    build_failure,
    custom_ops,
    lowered_model,
    network_from_onnx,
)
from dllava_export.backends.trt.engine_config import (
    ENGINES_FOLDER,
    RECOMPUTE_ENGINE,
    EngineConfig,
    EngineFile,
    ProfileShapes,
    bundle_digest,
    engine_folder,
    write_engine_config,
)
from dllava_export.backends.trt.trt_module import TENSORRT, trt_logger, trt_module
from dllava_export.bundles.files import tool_versions
from dllava_export.bundles.graph_facts import check_graphs
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import BackendError, EngineBuildError
from dllava_export.reporting.byte_sizes import format_bytes
from dllava_export.reporting.output_folders import replaced_folder
from dllava_export.reporting.resources import stage

__all__ = ["build_engines"]

logger = logging.getLogger(__name__)

_ADVICE = (
    f"Engines lie in the bundle's folder {ENGINES_FOLDER}: use a copy of the bundle that you may "
    "write."
)

_WRITE_BYTES = 16 << 20
_ALIASING_OP = "KVCacheAttention"  # its plugin writes to its inputs, the caches


def build_engines(
    folder: str | Path, options: BuildOptions, *, progress: bool = False
) -> BuildReport:
    """Build every engine of a bundle; those of an earlier build are replaced.

    Args:
        folder: The bundle.
        options: What to build and how.
        progress: Show a bar per engine on stderr.

    Raises:
        BackendError: If the backend is missing, too old, or cannot do what is asked here.
        BundleError: If the bundle is incomplete or changed, or cannot be written to.
        EngineBuildError: If TensorRT refuses a graph; the message names the node.
        SettingError: If the settings do not fit the model.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_graphs(folder, manifest)
    plan = plan_build(folder, manifest, options)
    if not options.force:
        _check_memory(plan)
    trt = trt_module(options.backend)
    target = engine_folder(folder, options.backend)
    with contextlib.ExitStack() as stack:
        build = _Build(trt, folder, plan, options, progress)
        partial = stack.enter_context(replaced_folder(target, _ADVICE))
        build.run(partial)
        config = build.config()
        write_engine_config(partial, config)
    return BuildReport(target, config, build.seconds)


def _check_memory(plan: BuildPlan) -> None:
    available = available_bytes()
    if available is None:
        logger.info("The system does not tell how much memory is free; building anyway.")
        return
    if plan.memory_bytes > available:
        raise EngineBuildError(
            f"The build needs about {format_bytes(plan.memory_bytes)} of memory, and "
            f"{format_bytes(available)} are available. Free memory, use a larger machine, or "
            "try it anyway with --force."
        )


class _Build:
    """One run of `build_engines`: the builder and what has been built so far."""

    def __init__(
        self,
        trt: ModuleType,
        folder: Path,
        plan: BuildPlan,
        options: BuildOptions,
        progress: bool,
    ) -> None:
        self._trt = trt
        self._folder = folder
        self._plan = plan
        self._progress = progress
        self._log = trt_logger(trt)
        self._settings = BuilderSettings(trt, folder, options)
        self._plugin_ops = _register_plugins(trt) if plan.backend == TENSORRT else ()
        self._builder = trt.Builder(self._log)
        self._engines: dict[str, EngineFile] = {}
        self._not_built: dict[str, str] = {}
        self._plugins: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def run(self, target: Path) -> None:
        """Build all engines into a folder."""
        for engine in self._plan.engines:
            start = time.perf_counter()
            try:
                with stage(f"{engine.name} engine"):
                    self._engines[engine.name] = self._build(engine, target)
            except EngineBuildError as error:
                if engine.name != RECOMPUTE_ENGINE:
                    raise
                self._not_built[engine.name] = str(error)
                logger.warning("There is no recompute engine: %s", error)
                continue
            self.seconds[engine.name] = time.perf_counter() - start
        self._settings.save_timing_cache(target)
        self._tell_bodies()

    def config(self) -> EngineConfig:
        """Return what `config.json` says of them."""
        plan = self._plan
        return EngineConfig(
            backend=plan.backend,
            backend_version=str(self._trt.__version__),
            compute_capabilities=self._settings.compute_capabilities,
            precision=plan.precision,
            max_batch_size=plan.max_batch_size,
            max_input_len=plan.max_input_len,
            capacities=dict(plan.kv.capacities),
            is_stripped=self._settings.is_stripped,
            engines=self._engines,
            not_built=self._not_built,
            plugins=self._plugins,
            bundle_digest=bundle_digest(self._folder),
            timing_cache=self._settings.timing_cache_name,
            tool_versions=tool_versions(),
        )

    def _build(self, engine: EnginePlan, target: Path) -> EngineFile:
        path = self._folder / engine.graph
        model = load_structure(path)
        places = NodePlaces(model, engine.name)
        lowered = lowered_model(model, self._plan.kv.capacities, self._plugin_ops)
        self._note_plugins(custom_ops(model))
        network = network_from_onnx(self._trt, self._builder, self._log, lowered, path, places)
        config = self._builder.create_builder_config()
        self._settings.apply(config)
        if _ALIASING_OP in self._plugin_ops:
            feature = self._trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03
            config.set_preview_feature(feature, True)
        profiles = self._add_profiles(network, config, engine)
        monitor = progress_monitor(self._trt, engine.name, show=self._progress)
        config.progress_monitor = monitor
        self._log.errors.clear()
        serialized = self._builder.build_serialized_network(network, config)
        monitor.close()
        if monitor.was_interrupted:
            raise KeyboardInterrupt
        if serialized is None:
            raise build_failure(path, self._log.errors, places)
        for error in self._log.errors:
            logger.warning("TensorRT reported, and built %s all the same: %s", path, error)
        self._settings.keep_timing_cache(config)
        return _write_engine(target / f"{engine.name}.engine", serialized, profiles)

    def _note_plugins(self, ops: tuple[str, ...]) -> None:
        for op in ops:
            self._plugins[op] = "plugin" if op in self._plugin_ops else "body"

    def _tell_bodies(self) -> None:
        bodies = [op for op, how in self._plugins.items() if how == "body"]
        if self._plan.backend == TENSORRT and bodies:
            logger.info("No plugin, computed by their bodies: %s", ", ".join(bodies))

    def _add_profiles(
        self, network: Any, config: Any, engine: EnginePlan
    ) -> dict[str, dict[str, ProfileShapes]]:
        """Add the plan's profiles; return them as the network takes them."""
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        added = {}
        for name, planned in engine.profiles.items():
            profile = self._builder.create_optimization_profile()
            added[name] = {
                tensor.name: _set_range(profile, tensor, planned[tensor.name])
                for tensor in inputs
            }
            if config.add_optimization_profile(profile) < 0:
                raise EngineBuildError(
                    f"TensorRT refuses profile {name!r} of the {engine.name} engine: "
                    f"{' '.join(self._log.errors) or added[name]}. Change --min-shapes, "
                    "--opt-shapes or --max-shapes."
                )
        return added


def _set_range(profile: Any, tensor: Any, planned: ProfileShapes) -> ProfileShapes:
    """Set one input's range: values for a shape tensor, else shapes."""
    if tensor.is_shape_tensor:
        profile.set_shape_input(tensor.name, planned.min, planned.opt, planned.max)
        return planned
    if planned.is_values:  # an input whose value no shape depends on in this backend
        planned = ProfileShapes((1,), (1,), (1,))
    profile.set_shape(tensor.name, planned.min, planned.opt, planned.max)
    return planned


def _register_plugins(trt: ModuleType) -> tuple[str, ...]:
    """Return the ops that have a plugin; none where plugins cannot be had here."""
    from dllava_export.plugins import register_plugins

    try:
        return tuple(register_plugins(trt))
    except BackendError as error:
        logger.info("There are no plugins: %s", error)
        return ()


def _write_engine(
    path: Path, serialized: Any, profiles: dict[str, dict[str, ProfileShapes]]
) -> EngineFile:
    """Write an engine in pieces, so that it is never in memory twice."""
    data = memoryview(serialized).cast("B")
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, len(data), _WRITE_BYTES):
            piece = data[start : start + _WRITE_BYTES]
            digest.update(piece)
            file.write(piece)
    return EngineFile(path.name, digest.hexdigest(), len(data), profiles)
