"""Golden runs of the official code, and how to feed the same tokens to a session."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from places import DATA

from dllava_export import names
from dllava_export.runtime.results import DecodeResult, PrefillResult
from dllava_export.runtime.session import Session

__all__ = [
    "CASES",
    "DATA",
    "RECOMPUTE_STEPS",
    "GoldenCase",
    "Run",
    "feed",
    "golden_shapes",
    "load_case",
    "unlowered_feeds",
]

CASES = {"case_1": "mha", "case_2": "mha", "case_3": "gqa", "case_5": "gqa"}
RECOMPUTE_STEPS = (1, 7, 24)


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """One golden run; arrays as in the README beside the golden runs.

    Attributes:
        checkpoint: Folder under `DATA`.
        arrays: By name.
    """

    checkpoint: str
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def input_ids(self) -> np.ndarray:
        """[1, t] int64."""
        return self["input_ids"]

    @property
    def images(self) -> np.ndarray:
        """[1, 3, size, size] float32."""
        return self["images"]

    @property
    def tokens(self) -> np.ndarray:
        """[T, 1] int64, fed one by one."""
        return self["decode_token_ids"]

    @property
    def num_prompt(self) -> int:
        """Rows of the prompt before selection."""
        return self["inputs_embeds"].shape[1]

    @property
    def num_dropped(self) -> int:
        """Image rows that do not go on."""
        return self.num_prompt - self["prefill_logits"].shape[1]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self["decode_cache_lengths"].shape[1]

    @property
    def image_scores(self) -> np.ndarray:
        """[n_image] float64, log-softmax of column 0."""
        logits = self["image_predictor_logits"][0].astype(np.float64)
        return logits[:, 0] - np.logaddexp(logits[:, 0], logits[:, 1])

    @property
    def kept_image_indices(self) -> np.ndarray:
        """[k], ascending: the best scores."""
        num_kept = len(self.image_scores) - self.num_dropped
        return np.sort(np.argsort(-self.image_scores)[:num_kept])

    def image_margins(self) -> np.ndarray:
        """[n_image] distance of each score from the middle of last kept and first dropped."""
        ranked = np.sort(self.image_scores)
        threshold = ranked[self.num_dropped - 1 : self.num_dropped + 1].mean()
        return np.abs(self.image_scores - threshold)

    def keep_margins(self) -> np.ndarray:
        """[T] distance of the two logits behind each keep bit."""
        return np.abs(np.diff(self["decode_predictor_logits"][:, 0])[:, 0])


def load_case(name: str) -> GoldenCase:
    """Read a golden run."""
    checkpoint = CASES[name]
    with np.load(DATA / checkpoint / f"{name}.npz") as arrays:
        return GoldenCase(checkpoint, dict(arrays))


@dataclasses.dataclass(frozen=True)
class Run:
    """A session's results; `prefill_caches` are copies of the valid rows."""

    prefill: PrefillResult
    prefill_caches: list[tuple[np.ndarray, np.ndarray]]
    steps: list[DecodeResult]

    @property
    def keep(self) -> np.ndarray:
        """[T, batch] bool."""
        return np.stack([step.keep for step in self.steps])

    @property
    def logits(self) -> np.ndarray:
        """[T, batch, vocab_size]."""
        return np.stack([step.logits for step in self.steps])

    @property
    def cache_lengths(self) -> np.ndarray:
        """[T, layers, batch]."""
        return np.stack([step.cache_lengths for step in self.steps])


def golden_shapes(checkpoint: str) -> dict[str, tuple[int, ...]]:
    """Return canonical name → shape of a golden checkpoint's tensors, written by hand once."""
    values = json.loads((DATA / checkpoint / "shapes.json").read_text(encoding="utf-8"))
    return {name: tuple(shape) for name, shape in values.items()}


def feed(session: Session, input_ids, tokens, **prefill) -> Run:
    """Prefill, then feed `tokens` [T, batch] whatever the logits say."""
    prefill.setdefault("max_new_tokens", 64)
    result = session.prefill(input_ids, **prefill)
    caches = valid_caches(session)
    return Run(result, caches, [session.decode(row) for row in tokens])


def valid_caches(session: Session) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return copies of each layer's keys and values, of the first sample, valid rows only."""
    return [
        tuple(part[:1, :, :length].copy() for part in session.cache(layer))
        for layer, length in enumerate(session.cache_lengths[:, 0])
    ]


def unlowered_feeds(case: GoldenCase, embeds: np.ndarray, first: int) -> dict[str, np.ndarray]:
    """Return what a decoder reads beside its caches, for rows from position `first` on.

    Rows within the case's image span are image rows; a row behind the prompt is generated.
    """
    rows = np.arange(first, first + embeds.shape[1])
    start, end = case["image_span"]
    is_image = (rows >= start) & (rows < end)
    kind = np.where(is_image, names.IMAGE, names.PROMPT_TEXT)
    kind[rows >= case.num_prompt] = names.GENERATED_TEXT
    num_kept = len(rows) - (case.num_dropped if is_image.any() else 0)
    return {
        names.INPUTS_EMBEDS: embeds,
        names.POSITION_IDS: rows[None],
        names.TOKEN_KIND: kind[None],
        names.NUM_KEPT: np.array([num_kept]),
        names.KEPT_LENGTHS: np.array([num_kept]),
        names.NUM_IMAGE_ROWS: np.array([is_image.sum()]),
    }
