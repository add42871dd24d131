"""Write what a validation feeds each graph, so that polygraphy's own tools can feed it too.

    FOLDER/
      visual.json            visual/model.onnx: pixel values
      decoder_prefill.json   llm/model.onnx: the prompt, empty caches
      decoder_decode.json    llm/model.onnx: the last token, caches filled by all before it
      recompute.json         llm/recompute.onnx: prompt and answer
      dense.json             llm/dense.onnx: the same

Each file is what `polygraphy run --load-inputs` takes: a list with one dictionary, input name →
array, as `polygraphy.json.save_json` writes it. Caches have room for this conversation, not for
the longest one that the model could have.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import BackendError
from dllava_export.precision import BF16
from dllava_export.reporting.byte_sizes import format_bytes
from dllava_export.reporting.output_folders import new_folder
from dllava_export.runtime.session import Session
from dllava_export.validation.conversation import Conversation, conversation_for
from dllava_export.validation.graph_backend import GraphBackend, bundle_graphs
from dllava_export.validation.settings import Tolerances, ValidationSettings, tolerances_for

if TYPE_CHECKING:
    import onnxruntime as ort

    from dllava_export.bundles.manifest import Manifest
    from dllava_export.validation.marked_graphs import MarkedModel


__all__ = ["GraphInputs", "SavedInputs", "save_graph_inputs"]

VISUAL_GRAPH = f"{layout.VISUAL_FOLDER}/{layout.VISUAL}"
DECODER_GRAPH = f"{layout.LLM_FOLDER}/{layout.DECODER}"
RECOMPUTE_GRAPH = f"{layout.LLM_FOLDER}/{layout.RECOMPUTE}"
DENSE_GRAPH = f"{layout.LLM_FOLDER}/{layout.DENSE_DECODER}"

Feed = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class GraphInputs:
    """One file of inputs.

    Attributes:
        file: Where it lies.
        graph: What takes it, in the bundle, for example `llm/model.onnx`.
        use: What the graph then does, for people.
        num_bytes: Size of the file.
    """

    file: Path
    graph: str
    use: str
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class SavedInputs:
    """What was written, and how it is used.

    Attributes:
        bundle: Its folder.
        origin: Where the values come from, for people.
        tolerances: How close two runtimes must come.
        files: In the order in which a model runs its graphs.
    """

    bundle: Path
    origin: str
    tolerances: Tolerances
    files: tuple[GraphInputs, ...]

    def to_text(self) -> str:
        """Return a list of the files and a command line for each."""
        width = max(len(str(each.file)) for each in self.files)
        listed = [
            f"  {each.file!s:<{width}}  {format_bytes(each.num_bytes):>10}  "
            f"{each.graph}, {each.use}"
            for each in self.files
        ]
        return "\n".join(
            (
                f"Wrote inputs of every graph ({self.origin}):",
                *listed,
                "Run each graph as it is on disk, and as the product runs it in ONNX Runtime:",
                *(f"  {self.command(each)}" for each in self.files),
            )
        )

    def command(self, inputs: GraphInputs) -> str:
        """Return a command line that runs a graph in polygraphy.

        The product runs no dense decoder, so that there is nothing to compare that one with.
        """
        words = ["polygraphy", "run", str(self.bundle / inputs.graph), "--onnxrt"]
        if inputs.graph != DENSE_GRAPH:
            words.append("--dllava-onnxruntime")
        words += ["--load-inputs", str(inputs.file)]
        if inputs.graph != DENSE_GRAPH:
            allowed = self.tolerances
            words += ["--atol", f"{allowed.atol:g}", "--rtol", f"{allowed.rtol:g}"]
        return shlex.join(words)


def save_graph_inputs(
    bundle: str | Path,
    folder: str | Path,
    settings: ValidationSettings | None = None,
    *,
    image: str | None = None,
    prompt: str | None = None,
) -> SavedInputs:
    """Write the inputs of each graph of a bundle for polygraphy's `--load-inputs`.

    The portable graphs run the conversation in ONNX Runtime on the CPU, since a decode step
    reads what earlier runs cached. Nothing is left behind where that or the writing fails.

    Args:
        bundle: The bundle.
        folder: New or empty folder.
        settings: Number of steps, seed, threads and, for a prompt, what answers it; as
            `validate` takes them.
        image: A picture for `prompt`, or `none` for a text-only one.
        prompt: The question; None draws random pixels and tokens.

    Raises:
        BackendError: If the bundle is in bf16, or cannot be run.
        BundleError: If the bundle is incomplete or changed, or `folder` has files in it or
            cannot be written.
        InvalidInputError: If the prompt does not fit the bundle.
    """
    bundle, folder = Path(bundle), Path(folder)
    settings = settings or ValidationSettings()
    manifest = read_manifest(bundle)
    if manifest.precision.activations == BF16:
        raise BackendError(
            "The bundle is in bf16, which neither polygraphy's files nor ONNX Runtime on the "
            "CPU have. Export it with --precision fp16 or fp32 to look at it in polygraphy."
        )
    with new_folder(folder) as partial:
        conversation = conversation_for(bundle, manifest, settings, image=image, prompt=prompt)
        files = [
            _written(partial, folder, name, graph, use, feed)
            for name, (graph, use, feed) in _feeds(
                bundle, manifest, conversation, settings.num_threads
            ).items()
        ]
    return SavedInputs(
        bundle, conversation.origin, tolerances_for(settings, manifest), tuple(files)
    )


def _written(
    partial: Path, folder: Path, name: str, graph: str, use: str, feed: Feed
) -> GraphInputs:
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    path = partial / f"{name}.json"
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json([dict(feed)], str(path))
    return GraphInputs(folder / path.name, graph, use, path.stat().st_size)


def _feeds(
    folder: Path, manifest: Manifest, conversation: Conversation, num_threads: int | None
) -> dict[str, tuple[str, str, Feed]]:
    """Return file name → graph, use and inputs."""
    found: dict[str, tuple[str, str, Feed]] = {}
    backend = _RecordingBackend(
        folder, bundle_graphs(folder), layers=False, lowered=False, num_threads=num_threads
    )
    session = Session(folder, manifest, backend, manifest.max_position_embeddings)
    # Drawn at random, or a whole prompt: nothing in it is padding.
    whole = np.ones_like(conversation.input_ids)
    ids = session.normalised_prompts(conversation.input_ids, whole)
    answer = conversation.output_ids
    features = conversation.image_features
    if conversation.pixel_values is not None:
        features = session.encode_images(conversation.pixel_values)
        (entry,) = manifest.tensors[VISUAL_GRAPH]["inputs"]
        pixels = conversation.pixel_values.astype(entry["dtype"])
        found["visual"] = (VISUAL_GRAPH, "one image", {entry["name"]: pixels})
    session.prefill(ids, image_features=features, max_new_tokens=len(answer))
    rows = backend.num_rows
    found["decoder_prefill"] = (DECODER_GRAPH, f"prefill of {rows} rows", backend.feed)
    for token in answer:
        session.decode([int(token)])
    use = f"decode step {len(answer)}"
    found["decoder_decode"] = (DECODER_GRAPH, use, backend.feed)
    session.recompute(ids, output_ids=answer[None], image_features=features)
    rows = backend.num_rows
    found["recompute"] = (RECOMPUTE_GRAPH, f"{rows} rows", backend.feed)
    wanted = [entry["name"] for entry in manifest.tensors[DENSE_GRAPH]["inputs"]]
    # A decoder of someone else's may take token ids, which an image has none of.
    if backend.feed.keys() >= set(wanted):
        dense = {name: backend.feed[name] for name in wanted}
        found["dense"] = (DENSE_GRAPH, f"{rows} rows", dense)
    return found


class _RecordingBackend(GraphBackend):
    """The portable graphs, and what the last run of a decoder was fed.

    Attributes:
        feed: Input name → array.
    """

    feed: Feed

    @property
    def num_rows(self) -> int:
        """Rows of the last run."""
        return int(self.feed[names.POSITION_IDS].shape[1])

    def _run(
        self, session: ort.InferenceSession, marked: MarkedModel, values: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        # Copies: the caches are views of buffers that the run's results are written to.
        self.feed = {entry.name: values[entry.name].copy() for entry in session.get_inputs()}
        return super()._run(session, marked, values)
