"""Random use of sessions from several threads at once: each answer is what it is alone.

The whole, 12 sequences of 40 steps over every kind of bundle:

    python -m pytest tests/runtime/test_concurrent_sessions.py -m "" --random-steps 40
"""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from dllava_export.errors import InvalidInputError

KINDS = {
    "predictor": ("mha", {}),
    "grouped heads": ("gqa", {}),
    "short caches": ("mha", {"output_text_keep_rate": 0.01}),
    "dense": ("mha", {"policy": "none"}),
}
NUM_SEQUENCES, NUM_THREADS = 12, 3
ONE_CHAT = threading.Lock()
WORDS = [f"w{number}" for number in range(3, 120)]


@dataclasses.dataclass(frozen=True)
class Call:
    """One use of a session: a batch, a stream, or a chat of several turns.

    Attributes:
        kind: `generate`, `stream`, `cancelled` or `chat`.
        prompts: [t] ids of each sample, a placeholder among them where it has a picture; texts
            in a chat.
        images: Seed of each one's picture, or None.
        settings: Of the generation.
    """

    kind: str
    prompts: tuple
    images: tuple
    settings: dict


def random_call(rng, has_tokenizer):
    kinds = ["generate", "generate", "stream", "cancelled", "chat"]
    kind = kinds[rng.integers(len(kinds) if has_tokenizer else 4)]
    settings = {
        "max_new_tokens": int(rng.integers(1, 24)),
        "temperature": float(rng.choice([0.0, 1.5])),
        "seed": int(rng.integers(100)),
    }
    if rng.random() < 0.2:
        settings |= {"repetition_penalty": 1.3, "top_k": 20}
    if kind == "chat":
        count = int(rng.integers(1, 4))
        prompts = tuple(" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count))
        image = int(rng.integers(3)) if rng.random() < 0.5 else None
        return Call(kind, prompts, (image,), settings)
    batch = int(rng.integers(1, 5)) if kind == "generate" else 1
    if rng.random() < 0.2:
        settings["mode"] = "recompute"
        settings["max_new_tokens"] = min(settings["max_new_tokens"], 5)
    prompts, images = [], []
    for _ in range(batch):
        ids = rng.integers(3, 131, rng.integers(2, 60))
        images.append(int(rng.integers(3)) if rng.random() < 0.4 else None)
        if images[-1] is not None:
            ids[rng.integers(len(ids))] = -200
        prompts.append(ids)
    return Call(kind, tuple(prompts), tuple(images), settings)


def picture(seed):
    if seed is None:
        return None
    return np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)


def told(generation):
    """Everything but the times."""
    values = dataclasses.asdict(generation)
    return {name: value for name, value in values.items() if not name.endswith("seconds")}


def made(session, call):
    """Make a call; return what it gave for each prompt."""
    images = [picture(seed) for seed in call.images]
    if call.kind == "generate":
        found = session.generate(images=images, input_ids=list(call.prompts), **call.settings)
        return [told(generation) for generation in found]
    if call.kind == "chat":
        with ONE_CHAT:  # two of them would end each other's time and again
            return chatted(session, call, images[0])
    stream = session.stream(image=images[0], input_ids=call.prompts[0], **call.settings)
    for number, _ in enumerate(stream, start=1):
        if call.kind == "cancelled" and number == 3:
            stream.close()
    return [told(stream.result)]


def chatted(session, call, image):
    """Ask all questions; begin anew where another thread's use has ended the chat."""
    while True:
        chat, found = session.chat(), []
        try:
            for turn, prompt in enumerate(call.prompts):
                given = image if turn == 0 else None
                found.append(told(chat.ask(prompt, given, **call.settings)))
        except InvalidInputError as error:
            assert "answered something else since the last question" in str(error)
            continue
        return found


def replayed(session, call):
    """What each prompt gives in a batch of its own, in one thread."""
    if call.kind == "chat" or len(call.prompts) == 1:
        return made(session, call)
    found = []
    for sample, (ids, seed) in enumerate(zip(call.prompts, call.images, strict=True)):
        if call.settings["temperature"] == 0 or sample == 0:
            alone = dataclasses.replace(call, prompts=(ids,), images=(seed,))
            found += made(session, alone)
        else:
            found.append(None)  # each sample of a batch draws from a stream of its own
    return found


@pytest.mark.parametrize(
    "sequence",
    [
        pytest.param(number, marks=[pytest.mark.slow] if number >= len(KINDS) else [])
        for number in range(NUM_SEQUENCES)
    ],
)
def test_answers_from_several_threads_are_those_of_batches_of_1(bundles, request, sequence):
    num_steps = request.config.getoption("--random-steps")
    name = list(KINDS)[sequence % len(KINDS)]
    checkpoint, sparsity = KINDS[name]
    rng = np.random.default_rng([2026, sequence])
    session = bundles.fresh_session(checkpoint, **sparsity)
    calls = [random_call(rng, checkpoint == "mha") for _ in range(num_steps)]
    found = [None] * num_steps
    failures = []

    def work(first):
        try:
            for number in range(first, num_steps, NUM_THREADS):
                found[number] = made(session, calls[number])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    alone = bundles.session(checkpoint, **sparsity)
    for number, call in enumerate(calls):
        expected = replayed(alone, call)
        assert len(found[number]) == len(expected)
        for sample, (one, other) in enumerate(zip(found[number], expected, strict=True)):
            assert other is None or one == other, (number, sample, call)
