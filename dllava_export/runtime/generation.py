"""The generation loop: from prompts to text, with and without a KV cache, or on top of one."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dllava_export.errors import InvalidInputError, SettingError
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.tokenizer import StreamDecoder
from dllava_export.runtime.results import DecodeResult, Generation, Piece, PrefillResult
from dllava_export.runtime.sampling import Sampler

if TYPE_CHECKING:
    from dllava_export.prompts.reader import Prompts
    from dllava_export.runtime.decoding import DecodingSession

__all__ = [
    "MODES",
    "CachedRun",
    "ExtendedRun",
    "GenerationLoop",
    "GenerationSettings",
    "RecomputeRun",
    "Run",
    "Stream",
    "prompt_ids",
    "start_run",
]

MODES = ("cache", "recompute")


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen, and how many; see `Session.generate`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    mode: str = "cache"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.max_new_tokens < 1:
            raise SettingError(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}."
            )
        self.sampler()

    def sampler(self) -> Sampler:
        """Return a sampler for one generation.

        Raises:
            SettingError: If a setting is out of range.
        """
        return Sampler(self.temperature, self.top_p, self.seed)


def prompt_ids(
    session: DecodingSession,
    prompts: Sequence[str] | None,
    images: Sequence[Any] | None,
    input_ids: Prompts | None,
) -> list[np.ndarray]:
    """Return the token ids of each prompt, [t] int64, image placeholders among them.

    Raises:
        InvalidInputError: If prompts and images do not fit each other.
    """
    if (prompts is None) == (input_ids is None):
        raise InvalidInputError("Give either prompts or input_ids, one of the two.")
    given = prompts if prompts is not None else input_ids
    count = len(given) if given is not None else 0
    if images is not None and len(images) != count:
        raise InvalidInputError(
            f"{len(images)} images were given for {count} prompts; expected one image, or None, "
            "for each prompt."
        )
    has_image = (
        [image is not None for image in images] if images is not None else [False] * count
    )
    if prompts is not None:
        tokenizer = session.tokenizer
        return [
            tokenizer.encode(tokenizer.render(prompt, with_image=with_image))
            for prompt, with_image in zip(prompts, has_image, strict=True)
        ]
    ids = session.normalised_prompts(input_ids if input_ids is not None else [])
    for sample, (row, with_image) in enumerate(zip(ids, has_image, strict=True)):
        if bool((row == IMAGE_PLACEHOLDER_ID).any()) != with_image:
            found, wanted = ("no", "an") if with_image else ("an", "no")
            raise InvalidInputError(
                f"Prompt {sample} has {found} image placeholder ({IMAGE_PLACEHOLDER_ID}), but "
                f"{wanted} image was given with it. Give both or neither."
            )
    return ids


def start_run(
    session: DecodingSession,
    ids: list[np.ndarray],
    images: Sequence[Any] | None,
    settings: GenerationSettings,
) -> Run:
    """Return what computes the answers to prompts from `prompt_ids`."""
    given = [image for image in images or () if image is not None]
    pixels = session.image_processor(given) if given else None
    run = CachedRun if settings.mode == "cache" else RecomputeRun
    return run(session, ids, pixels, settings.max_new_tokens)


class Run(abc.ABC):
    """Gives the logits of a batch, token after token."""

    batch: int

    @abc.abstractmethod
    def start(self, results: list[Generation]) -> np.ndarray:
        """Return the first logits, [batch, vocab_size] float32; note counts in the results."""

    @property
    @abc.abstractmethod
    def is_full(self) -> np.ndarray:
        """[batch] bool, true where no further token fits."""

    @abc.abstractmethod
    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
        """Feed tokens [batch] int64 of the active samples; return the next logits."""


class GenerationLoop:
    """Samples, streams and decides who is finished; a run supplies logits.

    Args:
        session: Gives tokenizer and end ids.
        run: Gives logits.
        settings: How tokens are chosen.
        on_start: Called when the prompts were fed.

    Attributes:
        results: One per sample; complete when `pieces` is exhausted.
    """

    def __init__(
        self,
        session: DecodingSession,
        run: Run,
        settings: GenerationSettings,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._on_start = run, on_start
        self._sampler = settings.sampler()
        self._max_new_tokens = settings.max_new_tokens
        self._eos = set(session.eos_token_ids)
        has_tokenizer = session.manifest.chat_template is not None
        self._decoders: list[StreamDecoder | None] = [
            session.tokenizer.stream_decoder() if has_tokenizer else None
            for _ in range(run.batch)
        ]
        self.results = [Generation() for _ in range(run.batch)]
        self._active = np.ones(run.batch, bool)

    def pieces(self) -> Generator[Piece, None, None]:
        """Generate until every sample is finished, and give each token as it comes.

        Closing the iterator ends the generation; what came until then stays in `results`.
        """
        start = time.perf_counter()
        prefill_seconds = 0.0
        try:
            logits = self._run.start(self.results)
            self._on_start()
            prefill_seconds = time.perf_counter() - start
            start = time.perf_counter()
            while True:
                tokens = self._sampler.sample(logits)
                yield from self._accept(tokens)
                self._active &= ~self._run.is_full
                if not self._active.any():
                    break
                logits = self._run.step(tokens, self._active, self.results)
        except GeneratorExit:
            for sample in np.flatnonzero(self._active):
                self.results[sample].finish_reason = "cancelled"
            raise
        finally:
            for result, decoder in zip(self.results, self._decoders, strict=True):
                result.text += decoder.flush() if decoder is not None else ""
                result.prefill_seconds = prefill_seconds
                result.decode_seconds = time.perf_counter() - start

    def _accept(self, tokens: np.ndarray) -> Iterator[Piece]:
        for sample in np.flatnonzero(self._active):
            result, token = self.results[sample], int(tokens[sample])
            if token in self._eos:
                result.finish_reason = "stop"
                self._active[sample] = False
                continue
            result.token_ids.append(token)
            decoder = self._decoders[sample]
            text = decoder.push(token) if decoder is not None else ""
            result.text += text
            self._active[sample] = len(result.token_ids) < self._max_new_tokens
            yield Piece(text, token, int(sample))


class Stream(Iterator[Piece]):
    """An answer that is being generated: iterate over its pieces, or close it to end it.

    Attributes:
        result: The answer so far; complete when the iteration has ended.
    """

    def __init__(self, loop: GenerationLoop) -> None:
        self._pieces = loop.pieces()
        self.result = loop.results[0]

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """End the generation; `result` keeps what came, with finish_reason `cancelled`."""
        if inspect.getgeneratorstate(self._pieces) == inspect.GEN_CREATED:
            self.result.finish_reason = "cancelled"
        self._pieces.close()


class CachedRun(Run):
    """Prefill, then one decode step per token."""

    def __init__(
        self,
        session: DecodingSession,
        ids: list[np.ndarray],
        pixels: np.ndarray | None,
        num_new: int,
    ) -> None:
        self.batch = len(ids)
        self._session = session
        self._ids, self._pixels, self._num_new = ids, pixels, num_new

    def start(self, results: list[Generation]) -> np.ndarray:
        """Prefill."""
        prefill = self.prefill()
        num_image_tokens = self._session.manifest.geometry.num_image_tokens
        for sample, result in enumerate(results):
            result.num_prompt_tokens = int(prefill.cache_lengths[0, sample])
            kept = int((prefill.kept_image_indices[sample] >= 0).sum())
            result.num_kept_image_tokens = kept
            result.num_image_tokens = num_image_tokens if kept else 0
        return prefill.logits

    def prefill(self) -> PrefillResult:
        """Feed the prompts; a subclass may look at what comes back."""
        return self._session.prefill(self._ids, self._pixels, max_new_tokens=self._num_new)

    def decode(self, tokens: np.ndarray, active: np.ndarray) -> DecodeResult:
        """Feed a token of each active sample; a subclass may look at what comes back."""
        return self._session.decode(tokens, active=active)

    @property
    def is_full(self) -> np.ndarray:
        """See `Run`."""
        return self._session.is_full

    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
        """Decode."""
        decoded = self.decode(tokens, active)
        for sample in np.flatnonzero(active):
            results[sample].num_fed_tokens += 1
            results[sample].num_kept_tokens += int(decoded.keep[sample])
            results[sample].num_forced_drops += int(decoded.forced[sample])
        return decoded.logits


class ExtendedRun(CachedRun):
    """A further prompt on top of the caches, then one decode step per token."""

    def __init__(self, session: DecodingSession, ids: np.ndarray) -> None:
        super().__init__(session, [ids], None, 0)

    def start(self, results: list[Generation]) -> np.ndarray:
        """Feed the prompt."""
        results[0].num_prompt_tokens = len(self._ids[0])
        return self._session.extend(self._ids).logits


class RecomputeRun(Run):
    """The whole sequence anew for every token; the image is encoded once."""

    def __init__(
        self,
        session: DecodingSession,
        ids: list[np.ndarray],
        pixels: np.ndarray | None,
        num_new: int,
    ) -> None:
        self.batch = len(ids)
        self._session = session
        self._ids, self._pixels = ids, pixels
        self._features: np.ndarray | None = None
        self._outputs = np.zeros((len(ids), 0), np.int64)
        self._prompt_rows = np.zeros(len(ids), np.int64)

    def start(self, results: list[Generation]) -> np.ndarray:
        """Encode the image and run the prompt."""
        session = self._session
        if self._pixels is not None:
            self._features = session.encode_images(self._pixels)
        num_image_tokens = session.manifest.geometry.num_image_tokens
        num_kept = session.manifest.sparsity.num_kept_image_tokens(num_image_tokens)
        for ids, result in zip(self._ids, results, strict=True):
            has_image = bool((ids == IMAGE_PLACEHOLDER_ID).any())
            result.num_image_tokens = num_image_tokens if has_image else 0
            result.num_kept_image_tokens = num_kept if has_image else 0
            result.num_prompt_tokens = len(ids) - has_image + result.num_image_tokens
        logits, self._prompt_rows = self._pass()
        return logits

    @property
    def is_full(self) -> np.ndarray:
        """See `Run`."""
        room = self._session.max_length - self._outputs.shape[1]
        images = self._session.manifest.geometry.num_image_tokens
        lengths = [
            len(ids) + (images - 1) * (IMAGE_PLACEHOLDER_ID in ids) for ids in self._ids
        ]
        return np.array(lengths) >= room

    def step(
        self, tokens: np.ndarray, active: np.ndarray, results: list[Generation]
    ) -> np.ndarray:
        """Run prompt and answer so far."""
        self._outputs = np.concatenate([self._outputs, tokens[:, None]], axis=1)
        logits, num_rows = self._pass()
        for sample in np.flatnonzero(active):
            results[sample].num_fed_tokens += 1
            results[sample].num_kept_tokens = int(num_rows[sample] - self._prompt_rows[sample])
        return logits

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        result = self._session.recompute(
            self._ids, None, self._outputs, image_features=self._features
        )
        return result.logits, result.num_rows
