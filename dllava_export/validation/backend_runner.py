"""One graph of a bundle in one of the product's backends, as a polygraphy runner.

It takes and gives what the graph on disk does, caches among it, so that it can stand beside
polygraphy's own runners of the same file. Inside it is what the product runs: ONNX Runtime's
own form of the graph with caches updated in place, or a TensorRT engine of the bundle.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from dllava_export import names
from dllava_export.backends.backend import StepInputs
from dllava_export.backends.cache_groups import cache_groups
from dllava_export.backends.kv_plan import KVPlan, bytes_per_row
from dllava_export.backends.registry import BACKENDS, backend_options
from dllava_export.bundles.manifest import Manifest, read_manifest
from dllava_export.errors import BackendError, DllavaExportError, InvalidInputError
from dllava_export.precision import BF16
from dllava_export.validation.graph_inputs import DECODER_GRAPH, RECOMPUTE_GRAPH, VISUAL_GRAPH

__all__ = ["BackendRunner", "BackendRunnerError"]

_GRAPHS = (DECODER_GRAPH, RECOMPUTE_GRAPH, VISUAL_GRAPH)

Arrays = Mapping[str, np.ndarray]


class BackendRunnerError(BackendError, PolygraphyException):
    """A backend cannot run a graph; polygraphy's tools have written the message already."""


class BackendRunner(BaseRunner):
    """A graph of a bundle in a backend of the product.

    Args:
        model: The graph's file in its bundle: `llm/model.onnx`, `llm/recompute.onnx` or
            `visual/model.onnx`.
        backend: As `load` takes it.
        options: The backend's own, as `load` takes them.
        name: For people; made from `backend` where None.

    Raises:
        BackendRunnerError: From `activate` and `infer`, if there is no such graph, or the
            backend is missing or cannot run it.
    """

    def __init__(
        self,
        model: str | Path,
        backend: str,
        *,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, prefix=f"dllava-{backend}")
        self._model = Path(model)
        self._backend_name = backend
        self._options = dict(options or {})

    def activate_impl(self) -> None:
        """Open the bundle in the backend."""
        with _told_to_polygraphy():
            folder, self._graph = _place_in_bundle(self._model)
            self._manifest = read_manifest(folder)
            self._tensors = self._manifest.tensors[self._graph]
            if self._manifest.precision.activations == BF16:
                raise BackendError(
                    f"{self._model} is in bf16, which polygraphy's arrays do not have. Export "
                    "with --precision fp16 or fp32, or use `dllava-export validate`."
                )
            factory = BACKENDS.get(self._backend_name)
            options = backend_options(factory, self._options)
            self._backend = factory.open(folder, self._manifest, options)

    def deactivate_impl(self) -> None:
        """Let the backend go, with its weights."""
        self._backend.close()
        del self._backend, self._manifest, self._tensors, self._graph

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return names, types and shapes of the graph on disk."""
        metadata = TensorMetadata()
        for entry in self._tensors["inputs"]:
            metadata.add(entry["name"], dtype=np.dtype(entry["dtype"]), shape=entry["shape"])
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        """Return the outputs of the graph on disk, in its types; inputs stay as they are."""
        with _told_to_polygraphy():
            found = self._run(feed_dict)
        return collections.OrderedDict(
            (entry["name"], found[entry["name"]].astype(entry["dtype"], copy=False))
            for entry in self._tensors["outputs"]
        )

    def _run(self, feed: Arrays) -> dict[str, np.ndarray]:
        if self._graph == DECODER_GRAPH:
            return self._run_decoder(feed)
        start = time.perf_counter()
        if self._graph == VISUAL_GRAPH:
            found = {names.IMAGE_FEATURES: self._backend.encode_images(*feed.values())}
        else:
            found = self._backend.recompute(_step_inputs(feed)).tensors()
        self.inference_time = time.perf_counter() - start
        return found

    def _run_decoder(self, feed: Arrays) -> dict[str, np.ndarray]:
        """Write the caches, run, read them; only the run counts as time of inference."""
        inputs = _step_inputs(feed)
        pasts = [
            (feed[names.past(layer, "key")], feed[names.past(layer, "value")])
            for layer in range(self._manifest.geometry.num_layers)
        ]
        capacities = [key.shape[2] for key, _ in pasts]
        self._backend.allocate(_plan(self._manifest, capacities, inputs))
        for layer, (key, value) in enumerate(pasts):
            self._backend.set_cache(layer, key, value)
        is_one_row = inputs.position_ids.shape[1] == 1
        start = time.perf_counter()
        outputs = self._backend.decode(inputs) if is_one_row else self._backend.run(inputs)
        self.inference_time = time.perf_counter() - start
        found = outputs.tensors()
        for layer, (past, _) in enumerate(pasts):
            for part, rows in zip(("key", "value"), self._backend.cache(layer), strict=True):
                # Copies of as many rows as were fed: an engine's buffers may have more, and
                # ONNX Runtime's are overwritten by the next run.
                found[names.present(layer, part)] = rows[:, :, : past.shape[2]].copy()
        return found


def _place_in_bundle(model: Path) -> tuple[Path, str]:
    """Return the bundle of a graph, and the graph's name there."""
    path = model.absolute()
    graph = f"{path.parent.name}/{path.name}"
    if graph not in _GRAPHS:
        raise InvalidInputError(
            f"{model} is none of the graphs that the product runs; expected "
            f"{', '.join(_GRAPHS)} in a bundle. Take one of them, or polygraphy's own runners."
        )
    return path.parent.parent, graph


def _plan(manifest: Manifest, capacities: list[int], inputs: StepInputs) -> KVPlan:
    """Return cache buffers as large as those that were fed, one capacity per layer."""
    groups = cache_groups(manifest.geometry, manifest.sparsity)
    return KVPlan(
        batch=len(inputs.position_ids),
        groups=groups,
        capacities={group.name: capacities[group.first_layer] for group in groups},
        bytes_per_row=bytes_per_row(manifest.geometry, manifest.precision),
    )


def _step_inputs(feed: Arrays) -> StepInputs:
    """Return a backend's inputs; those that only sparse graphs have get a dense one's values."""
    batch, rows = feed[names.POSITION_IDS].shape
    values: dict[str, Any] = {
        names.NUM_KEPT: np.array([rows]),
        names.KEPT_LENGTHS: np.full(batch, rows),
        names.NUM_IMAGE_ROWS: np.zeros(1, np.int64),
        **feed,
    }
    indices = {group: names.write_index(group) for group in names.GROUPS}
    return StepInputs(
        **{
            each.name: values[each.name]
            for each in dataclasses.fields(StepInputs)
            if each.name in values
        },
        write_indices={g: values[name] for g, name in indices.items() if name in values},
    )


@contextlib.contextmanager
def _told_to_polygraphy() -> Iterator[None]:
    """Report an expected error as polygraphy's tools do: one message, without a traceback."""
    try:
        yield
    except DllavaExportError as error:
        G_LOGGER.critical(str(error), ExceptionType=BackendRunnerError)
