"""Slots: requests that come and go beside each other, each as in a session of its own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tolerances

from dllava_export import names
from dllava_export.backends.backend import StepInputs
from dllava_export.backends.kv_plan import plan_kv_cache
from dllava_export.backends.ort.backend import OrtBackend
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import CapacityError, InvalidInputError
from dllava_export.prompts.reader import PromptReader
from dllava_export.prompts.rows import assemble_prompt
from dllava_export.runtime.slots import Slots

NUM_SLOTS, NUM_NEW = 3, 40
ANY_TOKEN = 3
KINDS = {
    "predictor": ("mha", {}),
    "grouped heads": ("gqa", {}),
    "uniform": ("mha", {"policy": "uniform", "output_text_keep_rate": 0.5}),
    "attention": ("gqa", {"policy": "attention"}),
    "dense": ("mha", {"policy": "none"}),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, with a picture of that seed if there is one."""

    ids: tuple[int, ...]
    image: int | None = None


REQUESTS = {
    "picture": Request((1, 5, -200, 9, 7), 0),
    "text": Request(tuple(range(3, 14))),
    "short": Request((40,)),
    "other picture": Request((-200, 60, 61, 62, 63, 64, 65), 1),
}


class Recorder(OrtBackend):
    """Notes what it is fed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fed = []

    def run(self, inputs, *, sample=None):
        self.fed.append((inputs, sample))
        return super().run(inputs, sample=sample)

    def decode(self, inputs):
        self.fed.append((inputs, None))
        return super().decode(inputs)


class Rig:
    """Slots over a bundle, and a session for what each request gives alone."""

    def __init__(self, bundles, checkpoint, sparsity, num_slots=NUM_SLOTS, num_new=NUM_NEW):
        folder = bundles.path(checkpoint, **sparsity)
        self.manifest = read_manifest(folder, verify=False)
        self.session = bundles.session(checkpoint, **sparsity)
        self.backend = Recorder(folder, self.manifest, num_threads=1)
        self.reader = PromptReader(folder, self.manifest, 512, self.backend.encode_images)
        self.slots = Slots(self.backend, max_length=512)
        self.slots.allocate(self.plan(num_slots, num_new))

    def plan(self, num_slots=NUM_SLOTS, num_new=NUM_NEW, num_prompt=None):
        num_prompt = num_prompt or self.manifest.geometry.num_image_tokens + 20
        return plan_kv_cache(
            self.manifest.geometry,
            self.manifest.sparsity,
            self.manifest.precision,
            batch=num_slots,
            num_prompt=num_prompt,
            num_kept=num_prompt,
            num_new=num_new,
        )

    def pixels(self, *requests):
        size = 84 if self.manifest.geometry.num_image_tokens == 36 else 112
        found = [
            np.random.default_rng(request.image).normal(size=(3, size, size))
            for request in requests
            if request.image is not None
        ]
        return np.stack(found) if found else None

    def rows(self, *requests):
        ids = [np.array(request.ids) for request in requests]
        return self.reader.rows(ids, self.pixels(*requests), None)

    def admit(self, slot, request):
        rows = self.rows(request)
        return self.slots.admit(rows, self.reader.kept_lengths(rows), slot).logits[0]

    def alone(self, request, num_steps):
        """Greedy tokens, logits and keep bits of a request in a session of batch 1."""
        result = self.session.prefill(
            [np.array(request.ids)], self.pixels(request), max_new_tokens=NUM_NEW
        )
        found = Answer(result.logits[0])
        for _ in range(num_steps):
            step = self.session.decode(found.tokens[-1:])
            found.add(step.logits[0], step.keep[0])
        return found


class Answer:
    """What one request gave so far."""

    def __init__(self, logits):
        self.tokens, self.logits, self.keep = [int(logits.argmax())], [logits], []

    def add(self, logits, keep):
        self.tokens.append(int(logits.argmax()))
        self.logits.append(logits)
        self.keep.append(bool(keep))


class Server:
    """Serves requests in slots, greedily; notes the answers by request."""

    def __init__(self, rig):
        self.rig = rig
        self.answers = {}
        self.serving = {}

    def admit(self, slot, name):
        self.serving[slot] = name
        self.answers[name] = Answer(self.rig.admit(slot, REQUESTS[name]))

    def release(self, slot):
        del self.serving[slot]
        self.rig.slots.release(slot)

    def step(self, count):
        for _ in range(count):
            tokens = np.full(len(self.rig.slots.positions), ANY_TOKEN)
            for slot, name in self.serving.items():
                tokens[slot] = self.answers[name].tokens[-1]
            step = self.rig.slots.step(self.rig.reader.lookup(tokens))
            for slot, name in self.serving.items():
                self.answers[name].add(step.logits[slot], step.keep[slot])
            idle = [slot for slot in range(len(tokens)) if slot not in self.serving]
            assert not step.keep[idle].any()
            assert not step.forced[idle].any()

    def check(self):
        for name, answer in self.answers.items():
            alone = self.rig.alone(REQUESTS[name], len(answer.tokens) - 1)
            assert answer.tokens == alone.tokens, name
            assert answer.keep == alone.keep, name
            np.testing.assert_allclose(
                answer.logits, alone.logits, rtol=0, atol=tolerances.SAME_MODEL, err_msg=name
            )


@pytest.fixture(params=KINDS)
def rig(request, bundles):
    return Rig(bundles, *KINDS[request.param])


@pytest.fixture
def dense(bundles):
    return Rig(bundles, *KINDS["dense"])


# Requests that come and go.


def test_a_request_that_comes_later_is_answered_as_alone(rig):
    server = Server(rig)
    server.admit(0, "text")
    server.step(4)
    server.admit(1, "picture")
    server.step(5)
    server.admit(2, "short")
    server.step(6)
    assert [len(answer.tokens) for answer in server.answers.values()] == [16, 12, 7]
    server.check()


def test_a_slot_is_used_again(rig):
    server = Server(rig)
    for slot, name in enumerate(("picture", "text")):
        server.admit(slot, name)
    server.step(5)
    server.release(0)
    server.step(3)
    server.admit(0, "other picture")
    server.step(4)
    server.release(1)
    server.admit(1, "short")
    server.step(5)
    assert [len(answer.tokens) for answer in server.answers.values()] == [6, 13, 10, 6]
    server.check()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_any_slot_may_come_first(rig, first):
    server = Server(rig)
    server.admit(first, "text")
    server.step(3)
    server.admit((first + 1) % 3, "picture")
    server.step(3)
    server.check()


def test_admitting_does_not_touch_the_neighbours(rig):
    server = Server(rig)
    server.admit(0, "picture")
    server.step(3)
    lengths = rig.slots.cache_lengths[:, 0]
    layers = range(rig.manifest.geometry.num_layers)
    before = [part[0].copy() for layer in layers for part in rig.backend.cache(layer)]
    position = rig.slots.positions[0]
    rig.admit(1, REQUESTS["text"])
    assert rig.slots.cache_lengths[:, 0].tolist() == lengths.tolist()
    assert rig.slots.positions[0] == position
    after = [part[0] for layer in layers for part in rig.backend.cache(layer)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_step_feeds_the_slots_that_are_busy(dense):
    dense.admit(1, REQUESTS["text"])
    assert dense.slots.is_busy.tolist() == [False, True, False]
    dense.slots.step(dense.reader.lookup(np.full(3, ANY_TOKEN)))
    assert dense.slots.num_rows.tolist() == [0, 12, 0]
    assert dense.slots.positions.tolist() == [0, 12, 0]
    inputs, _ = dense.backend.fed[-1]
    assert inputs.token_kind.tolist() == [[names.PADDING], [names.GENERATED_TEXT], [0]]
    assert inputs.kept_lengths.tolist() == [0, 1, 0]


def test_a_step_may_leave_busy_slots_out(dense):
    for slot, name in enumerate(("text", "short", "picture")):
        dense.admit(slot, REQUESTS[name])
    before = dense.slots.num_rows.copy()
    dense.slots.step(dense.reader.lookup(np.full(3, ANY_TOKEN)), [True, False, True])
    assert (dense.slots.num_rows - before).tolist() == [1, 0, 1]


def test_a_released_slot_is_empty_and_idle(dense):
    dense.admit(0, REQUESTS["text"])
    dense.admit(1, REQUESTS["short"])
    before = dense.slots.num_rows
    dense.slots.release(0)
    assert dense.slots.is_busy.tolist() == [False, True, False]
    assert dense.slots.num_rows.tolist() == [0, 1, 0]
    assert before.tolist() == [11, 1, 0]  # what a caller holds stays as it was


def test_all_slots_at_once_equal_one_by_one(rig):
    requests = [REQUESTS[name] for name in ("picture", "text", "other picture")]
    rows = rig.rows(*requests)
    together = rig.slots.admit(rows, rig.reader.kept_lengths(rows)).logits
    lengths, positions = rig.slots.cache_lengths, rig.slots.positions
    assert rig.slots.is_busy.all()
    rig.slots.allocate(rig.plan())
    one_by_one = [rig.admit(slot, request) for slot, request in enumerate(requests)]
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=tolerances.SAME_MODEL)
    assert rig.slots.cache_lengths.tolist() == lengths.tolist()
    assert rig.slots.positions.tolist() == positions.tolist()


def test_a_slot_is_extended_beside_others(rig):
    further = Request(tuple(range(70, 76)))
    server = Server(rig)
    server.admit(0, "text")
    server.admit(1, "picture")
    server.step(3)
    before = rig.slots.cache_lengths
    rows = rig.rows(further)
    outputs = rig.slots.extend(rows, 1)
    grown = rig.slots.cache_lengths - before
    assert (grown == [0, 6, 0]).all()

    answer = server.answers["picture"]
    rig.alone(REQUESTS["picture"], 3)
    extended = rig.session.extend([np.array(further.ids)])
    np.testing.assert_allclose(
        outputs.logits, extended.logits, rtol=0, atol=tolerances.SAME_MODEL
    )
    answer.tokens[-1] = int(outputs.logits[0].argmax())
    server.step(2)
    for token in answer.tokens[3:-1]:
        alone = rig.session.decode([token])
    np.testing.assert_allclose(
        answer.logits[-1], alone.logits[0], rtol=0, atol=tolerances.SAME_MODEL
    )


# Positions are not cache rows.


class FarPositions:
    """Rows stand 3 apart from 7 on, and what follows them 5 behind the last."""

    def prompt(self, token_kind):
        rows = np.arange(token_kind.shape[1], dtype=np.int64)
        lengths = (token_kind != names.PADDING).sum(1)
        return np.tile(7 + 3 * rows, (len(token_kind), 1)), 7 + 3 * (lengths - 1) + 5


def far_rows(rig, *requests):
    ids = [np.array(request.ids) for request in requests]
    features = None
    if rig.pixels(*requests) is not None:
        features = rig.backend.encode_images(rig.pixels(*requests))
    return assemble_prompt(ids, features, rig.reader.lookup, FarPositions())


def far(num_prompt, num_generated):
    """Positions of a prompt and what follows it, written out."""
    prompt = 7 + 3 * np.arange(num_prompt)
    return np.append(prompt, prompt[-1] + 5 + np.arange(num_generated))


def test_positions_go_their_own_way(dense):
    rows = far_rows(dense, REQUESTS["text"])
    dense.slots.admit(rows, dense.reader.kept_lengths(rows), 1)
    assert dense.slots.positions.tolist() == [0, 7 + 30 + 5, 0]
    assert dense.slots.num_rows.tolist() == [0, 11, 0]
    for _ in range(2):
        dense.slots.step(dense.reader.lookup(np.full(3, ANY_TOKEN)))
    dense.slots.extend(dense.rows(REQUESTS["picture"]), 1)
    fed = [
        inputs.position_ids[-1 if slot is not None else 1]
        for inputs, slot in dense.backend.fed
    ]
    assert fed[0].tolist() == far(11, 0).tolist()
    assert [positions.tolist() for positions in fed[1:3]] == [[42], [43]]
    assert fed[3].tolist() == list(range(44, 44 + 40))
    indices = [inputs.write_indices["full"][-1 if slot is not None else 1]
               for inputs, slot in dense.backend.fed]  # fmt: skip
    assert indices == [0, 11, 12, 13]
    assert dense.slots.positions[1] == 84
    assert dense.slots.num_rows[1] == 53


@pytest.mark.parametrize("name", ["text", "picture"])
def test_far_positions_equal_one_pass_over_them(dense, name):
    answer, further = [20, 21, 22], Request((30, 31))
    rows = far_rows(dense, REQUESTS[name])
    length = int(rows.lengths[0])
    dense.slots.admit(rows, dense.reader.kept_lengths(rows), 0)
    for token in answer:
        dense.slots.step(dense.reader.lookup(np.full(3, token)))
    logits = dense.slots.extend(dense.rows(further), 0).logits

    generated = dense.reader.lookup(np.array([*answer, *further.ids]))
    positions = far(length, 5)[None]
    total = np.array([length + 5])
    whole = dense.backend.recompute(
        StepInputs(
            inputs_embeds=np.concatenate([rows.inputs_embeds, generated[None]], 1),
            position_ids=positions,
            token_kind=np.full(positions.shape, names.PROMPT_TEXT),
            num_kept=total,
            kept_lengths=total,
            num_image_rows=np.zeros(1, np.int64),
            write_indices={},
        )
    )
    np.testing.assert_allclose(logits, whole.logits, rtol=0, atol=tolerances.SAME_MODEL)
    near = dense.alone(REQUESTS[name], 0)
    assert np.abs(near.logits[0] - logits[0]).max() > 1e-3


def test_the_policy_decides_by_positions(bundles):
    rig = Rig(bundles, *KINDS["uniform"])
    rows = far_rows(rig, REQUESTS["text"])
    rig.slots.admit(rows, rig.reader.kept_lengths(rows), 0)
    steps = [rig.slots.step(rig.reader.lookup(np.full(3, ANY_TOKEN))) for _ in range(6)]
    # Of every two positions the second is kept: ids 42, 43, ... are even, odd, ...
    assert [bool(step.keep[0]) for step in steps] == [p % 2 == 1 for p in range(42, 48)]


def test_rewinding_goes_back_in_positions_too(dense):
    rows = far_rows(dense, REQUESTS["text"])
    dense.slots.admit(rows, dense.reader.kept_lengths(rows), 0)
    embeds = dense.reader.lookup(np.full(3, ANY_TOKEN))
    first = dense.slots.step(embeds)
    before, positions = dense.slots.cache_lengths, dense.slots.positions
    after = dense.slots.step(embeds)
    dense.slots.step(embeds)
    dense.slots.rewind(before)
    assert dense.slots.positions.tolist() == positions.tolist()
    assert dense.slots.cache_lengths.tolist() == before.tolist()
    again = dense.slots.step(embeds)
    np.testing.assert_array_equal(again.logits[0], after.logits[0])
    assert (again.logits[0] != first.logits[0]).any()


def test_advancing_counts_rows_of_each_group(bundles):
    rig = Rig(bundles, *KINDS["uniform"])
    rig.admit(0, REQUESTS["text"])
    rig.slots.advance({names.FULL: 10, names.SPARSE: 5})
    assert rig.slots.cache_lengths[:, 0].tolist() == [21, 21, 16, 16]
    assert rig.slots.positions[0] == 21


# What is refused.


def test_a_full_slot_whichits_sample(bundles):
    rig = Rig(bundles, *KINDS["dense"])
    rig.slots.allocate(rig.plan(num_prompt=10, num_new=3))
    rig.admit(1, Request(tuple(range(3, 13))))
    embeds = rig.reader.lookup(np.full(3, ANY_TOKEN))
    for _ in range(3):
        rig.slots.step(embeds)
    with pytest.raises(CapacityError, match=r"cache of sample 1 is full at 13 tokens\. Allow"):
        rig.slots.step(embeds)
    rig.admit(0, REQUESTS["short"])
    rig.slots.step(embeds, [True, False, False])
    rig.slots.release(1)
    rig.slots.step(embeds)
    assert rig.slots.num_rows.tolist() == [3, 0, 0]


@pytest.mark.parametrize(
    ("which", "slot", "message"),
    [
        pytest.param(["text"], None, "1 prompts were given for 3 slots", id="too few"),
        pytest.param(["text", "short"], 1, "2 prompts were given for 1 slots", id="too many"),
    ],
)
def test_refuses_other_numbers_of_prompts(dense, which, slot, message):
    rows = dense.rows(*(REQUESTS[name] for name in which))
    with pytest.raises(InvalidInputError, match=message):
        dense.slots.admit(rows, rows.lengths, slot)


def test_refuses_another_number_of_active_slots(dense):
    dense.admit(0, REQUESTS["text"])
    embeds = dense.reader.lookup(np.full(3, ANY_TOKEN))
    with pytest.raises(InvalidInputError, match=r"active has shape \(1,\), expected \(3,\)"):
        dense.slots.step(embeds, [True])


def test_needs_caches(dense):
    slots = Slots(dense.backend, 512)
    with pytest.raises(InvalidInputError, match="There is no cache yet"):
        _ = slots.plan
