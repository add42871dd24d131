"""The generation loop: it chooses tokens, makes them text, and says who is finished and why."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dllava_export.errors import InvalidInputError, SettingError
from dllava_export.prompts.tokenizer import StreamDecoder
from dllava_export.runtime.logits import (
    LogitsProcessor,
    check_finite,
    penalised,
    processed,
    token_logprob,
)
from dllava_export.runtime.results import Generation, Piece
from dllava_export.runtime.runs import MODES, Run
from dllava_export.runtime.sampling import Sampler
from dllava_export.runtime.stop_strings import StopStrings
from dllava_export.settings import real_number, whole_number

if TYPE_CHECKING:
    from dllava_export.runtime.decoding import DecodingSession

__all__ = [
    "GenerationLoop",
    "GenerationSettings",
    "Stream",
]


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen, and how many; see `Session.generate`.

    A repetition penalty comes first, then the logits processors, then temperature, `top_k`,
    `top_p` and `min_p`.

    Attributes:
        max_new_tokens: Tokens generated at most, per sample.
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_p: Share of probability to sample from, in (0, 1].
        seed: For sampling; None draws differently in every run.
        mode: `cache`, or `recompute` for a pass without KV cache per token.
        top_k: Number of likeliest tokens to sample from; None for all.
        min_p: Tokens below this share of the likeliest one's probability are left out, in
            [0, 1].
        repetition_penalty: Above 1, makes tokens of prompt and answer less likely; above 0.
        stop: One text, or several, that end the answer, which ends before it.
        logits_processors: Called one after the other with a sample's logits and its tokens so
            far, see `LogitsProcessor`.
        top_logprobs: How many of the likeliest tokens are told in `Generation.logprobs`,
            beside the chosen one; None to tell nothing.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    mode: str = "cache"
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        if real_number("repetition_penalty", self.repetition_penalty) <= 0:
            raise SettingError(
                f"repetition_penalty must be above 0, got {self.repetition_penalty}."
            )
        if self.top_logprobs is not None:
            whole_number("top_logprobs", self.top_logprobs, 0)
        if not isinstance(self.stop, Sequence) or not all(
            isinstance(stop, str) and stop for stop in self.stops
        ):
            raise SettingError(
                f"stop must be a text, or several, none of them empty; got {self.stop!r}."
            )
        processors = self.logits_processors
        if not isinstance(processors, Sequence) or not all(map(callable, processors)):
            raise SettingError(
                f"logits_processors must be a list of callables, got {processors!r}."
            )
        self.sampler()

    def sampler(self) -> Sampler:
        """Return a sampler for one generation.

        Raises:
            SettingError: If a setting is out of range.
        """
        return Sampler(
            self.temperature, self.top_p, self.seed, top_k=self.top_k, min_p=self.min_p
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class GenerationLoop:
    """Samples, streams and decides who is finished; a run supplies logits.

    Args:
        session: Gives tokenizer and end ids.
        run: Gives logits.
        settings: How tokens are chosen.

    Attributes:
        results: One per sample; complete when `pieces` is exhausted.
    """

    def __init__(
        self, session: DecodingSession, run: Run, settings: GenerationSettings
    ) -> None:
        self._run = run
        self._use = session.use
        self._is_cancelled = False
        self._settings = settings
        self._sampler = settings.sampler()
        self._eos = set(session.eos_token_ids)
        has_tokenizer = session.manifest.chat_template is not None
        if settings.stops and not has_tokenizer:
            raise InvalidInputError(
                "stop is given as text, and the bundle has no tokenizer to find it with. Leave "
                "it out, or export from a checkpoint with a tokenizer."
            )
        self._texts = [
            _AnswerText(
                session.tokenizer.stream_decoder() if has_tokenizer else None, settings.stops
            )
            for _ in range(run.batch)
        ]
        self.results = [Generation() for _ in range(run.batch)]
        self._active = np.ones(run.batch, bool)

    def pieces(self) -> Generator[Piece, None, None]:
        """Generate until every sample is finished, and give each token as it comes.

        Closing the iterator ends the generation; what came until then stays in `results`. It
        holds the session until its end: see `SessionUse`.

        Raises:
            InvalidInputError: If the thread is in the middle of another answer of the session,
                or the session is closed.
            BackendError: If the model gives logits that are not finite.
        """
        with self._use.generation():
            try:
                yield from self._steps()
            except BaseException as error:
                reason = "cancelled" if isinstance(error, GeneratorExit) else "error"
                self.end(reason)
                raise
            self.end("cancelled")

    def cancel(self) -> None:
        """End the generation behind the token that is being computed."""
        self._is_cancelled = True

    def end(self, reason: str) -> None:
        """Note why the samples ended that are not finished."""
        for sample in np.flatnonzero(self._active):
            self.results[sample].finish_reason = reason
        self._active[:] = False

    def _steps(self) -> Iterator[Piece]:
        start = time.perf_counter()
        prefill_seconds = 0.0
        try:
            with self._use.step():
                logits = self._run.start(self.results)
            prefill_seconds = time.perf_counter() - start
            start = time.perf_counter()
            while True:
                tokens = self._chosen(logits)
                for piece in self._accept(tokens, logits):
                    yield piece
                    self._use.go_on()
                    if self._is_cancelled:
                        return
                if not self._active.any():
                    break
                with self._use.step():
                    logits = self._run.step(tokens, self._active, self.results)
        finally:
            for result, text in zip(self.results, self._texts, strict=True):
                result.text += text.flush()
                result.prefill_seconds = prefill_seconds
                result.decode_seconds = time.perf_counter() - start

    def _chosen(self, logits: np.ndarray) -> np.ndarray:
        """Return the next token of each active sample, [batch] int64; 0 for the others."""
        active = np.flatnonzero(self._active)
        settings = self._settings
        rows = []
        for sample in active:
            row, generated = logits[sample], self.results[sample].token_ids
            check_finite(row, int(sample), len(generated))
            if settings.repetition_penalty != 1:
                seen = np.concatenate(
                    [self._run.prompts[sample], np.array(generated, np.int64)]
                )
                row = penalised(row, seen, settings.repetition_penalty)
            if settings.logits_processors:
                row = processed(row, generated, settings.logits_processors)
            rows.append(row)
        tokens = np.zeros(len(logits), np.int64)
        tokens[active] = self._sampler.sample(np.stack(rows), active.tolist())
        return tokens

    def _accept(self, tokens: np.ndarray, logits: np.ndarray) -> Iterator[Piece]:
        is_full = self._run.is_full
        for sample in np.flatnonzero(self._active).tolist():
            result, token = self.results[sample], int(tokens[sample])
            if token in self._eos:
                result.finish_reason = "stop"
                self._active[sample] = False
            else:
                yield self._piece(sample, token, logits[sample], bool(is_full[sample]))
            if not self._active[sample] and (rest := self._texts[sample].flush()):
                result.text += rest
                yield Piece(rest, None, sample)

    def _piece(self, sample: int, token: int, logits: np.ndarray, is_full: bool) -> Piece:
        result, text = self.results[sample], self._texts[sample]
        result.token_ids.append(token)
        if self._settings.top_logprobs is not None:
            result.logprobs.append(token_logprob(logits, token, self._settings.top_logprobs))
        added = text.push(token)
        result.text += added
        if text.is_stopped:
            result.finish_reason = "stop"
        is_last = len(result.token_ids) >= self._settings.max_new_tokens
        self._active[sample] = not (text.is_stopped or is_last or is_full)
        return Piece(added, token, sample)


class _AnswerText:
    """The text of an answer as its tokens come, up to a stop string."""

    def __init__(self, decoder: StreamDecoder | None, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = StopStrings(stops)
        self._is_over = False

    @property
    def is_stopped(self) -> bool:
        return self._stops.found is not None

    def push(self, token: int) -> str:
        return "" if self._decoder is None else self._stops.push(self._decoder.push(token))

    def flush(self) -> str:
        """Return what was held back, once."""
        if self._decoder is None or self._is_over or self.is_stopped:
            return ""
        self._is_over = True
        return self._stops.push(self._decoder.flush()) + self._stops.flush()


class Stream(Iterator[Piece]):
    """An answer that is being generated: iterate over its pieces, or close it to end it.

    From the first piece on it holds the session, until it ends, is closed, or is dropped. Its
    pieces may be taken by different threads, one after the other.

    Attributes:
        result: The answer so far; complete when the iteration has ended.
    """

    def __init__(self, loop: GenerationLoop) -> None:
        self._loop = loop
        self._pieces = loop.pieces()
        self._advancing = threading.Lock()
        self.result = loop.results[0]

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        if not self._advancing.acquire(blocking=False):
            raise InvalidInputError(
                "Another thread is taking the next piece of this stream; expected one at a "
                "time. Let a single thread iterate, or put a lock around next()."
            )
        try:
            return next(self._pieces)
        finally:
            self._advancing.release()

    def close(self) -> None:
        """End the generation; `result` keeps what came, with finish_reason `cancelled`.

        It may be called from any thread. Where another one is taking the next piece, that piece
        is the last.
        """
        self._loop.cancel()
        if self._advancing.acquire(blocking=False):
            try:
                self._pieces.close()
                self._loop.end("cancelled")  # where it had not begun
            finally:
                self._advancing.release()
