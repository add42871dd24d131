from __future__ import annotations

import ctypes
import types

import numpy as np
import pytest

from dllava_export import names
from dllava_export.backends.trt.caches import DeviceCaches, WriteIndices
from dllava_export.backends.trt.memory_layout import ALIGNMENT, BlockLayout, TensorSpec

KEY, VALUE = names.past(0, "key"), names.past(0, "value")
INPUTS = [
    {"name": name, "dtype": "int64", "shape": ["batch"]}
    for name in (
        names.KEPT_LENGTHS,
        names.write_index(names.FULL),
        names.write_index(names.SPARSE),
    )
]
OUTPUTS = [
    {"name": name, "dtype": "int64", "shape": ["batch"]}
    for name in (
        names.KEEP,
        names.next_write_index(names.SPARSE),
        names.LOGITS,
        names.next_write_index(names.FULL),
    )
]


class HostMemory:
    """Allocates and copies as a GPU does, at once and in the memory of this process."""

    def __init__(self):
        self.blocks = []
        self.num_copies = 0

    def allocate(self, num_bytes, what):
        block = np.zeros(num_bytes + ALIGNMENT, np.uint8)
        self.blocks.append(block)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        return types.SimpleNamespace(address=address, num_bytes=num_bytes)

    def copy(self, target, source, num_bytes):
        self.num_copies += 1
        ctypes.memmove(target, source, num_bytes)

    def synchronize(self):
        pass

    def read(self, address, shape, dtype):
        array = np.empty(shape, dtype)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array


def write(address, values):
    ctypes.memmove(address, values.ctypes.data, values.nbytes)


@pytest.fixture
def memory():
    return HostMemory()


def make_caches(memory, capacity):
    """Three samples; a sample takes 2 * capacity * 16 * 4 bytes."""
    spec = TensorSpec(np.dtype(np.float32), (3, 2, capacity, 16))
    caches = DeviceCaches({KEY: spec, VALUE: spec}, memory)
    values = np.arange(np.prod(spec.shape), dtype=np.float32).reshape(spec.shape)
    with caches.addresses() as addresses:
        write(addresses[KEY], values)
        write(addresses[VALUE], -values)
    return caches, values


def test_past_and_present_share_one_buffer(memory):
    caches, values = make_caches(memory, capacity=4)
    with caches.addresses() as addresses:
        assert set(addresses) == {KEY, VALUE, names.present_of(KEY), names.present_of(VALUE)}
        assert addresses[KEY] == addresses["present.0.key"] != addresses["present.0.value"]
    assert np.array_equal(caches.read(KEY, 3), values)
    assert np.array_equal(caches.read(VALUE, 2), -values[:2])


def test_rows_are_written_to_the_first_samples(memory):
    caches, values = make_caches(memory, capacity=4)
    rows = np.full((2, 2, 3, 16), 7, np.float32)
    caches.write(KEY, rows)
    found = caches.read(KEY, 3)
    assert np.array_equal(found[:2, :, :3], rows)
    assert (found[:2, :, 3:] == 0).all()
    assert np.array_equal(found[2], values[2])
    assert np.array_equal(caches.read(VALUE, 3), -values)


@pytest.mark.parametrize(
    ("capacity", "num_copies"),
    [pytest.param(4, 0, id="in place"), pytest.param(5, 4, id="copied out and back")],
)
def test_one_samples_part_is_aligned_and_written(memory, capacity, num_copies):
    caches, values = make_caches(memory, capacity)
    with caches.addresses(sample=1) as addresses:
        assert all(address % ALIGNMENT == 0 for address in addresses.values())
        found = memory.read(addresses[VALUE], values[1].shape, values.dtype)
        assert np.array_equal(found, -values[1])
        write(addresses["present.0.key"], values[1] + 1000)
    assert memory.num_copies == num_copies
    expected = values.copy()
    expected[1] += 1000
    assert np.array_equal(caches.read(KEY, 3), expected)
    assert np.array_equal(caches.read(VALUE, 3), -values)


def test_sample_buffers_are_allocated_once(memory):
    caches, _ = make_caches(memory, capacity=5)
    before = len(memory.blocks)
    for sample in (0, 2, 1):
        with caches.addresses(sample):
            pass
    assert len(memory.blocks) == before + 2


def stored(memory, addresses, batch):
    return [memory.read(a, (batch,), np.dtype(np.int64)).tolist() for a in addresses.values()]


def feeds(full, sparse):
    return {
        names.write_index(names.FULL): np.array(full),
        names.write_index(names.SPARSE): np.array(sparse),
    }


def test_write_indices_are_uploaded(memory):
    indices = WriteIndices(INPUTS, 4, memory)
    addresses = indices.addresses(2)
    assert list(addresses) == [names.write_index(names.FULL), names.write_index(names.SPARSE)]
    indices.upload(feeds([7, 8], [3, 4]))
    assert stored(memory, addresses, 2) == [[7, 8], [3, 4]]


def run_step(memory, indices, batch):
    """Leave the next write indices 9, 9, ... and 5, 5, ... where an engine would."""
    ordered = indices.outputs_first(OUTPUTS)
    layout = BlockLayout.of(
        {entry["name"]: TensorSpec(np.dtype(np.int64), (batch,)) for entry in ordered}
    )
    block = memory.allocate(layout.num_bytes, "outputs")
    outputs = {entry["name"]: np.zeros(batch, np.int64) for entry in OUTPUTS}
    outputs[names.next_write_index(names.FULL)] += 9
    outputs[names.next_write_index(names.SPARSE)] += 5
    addresses = layout.addresses(block.address)
    for name, values in outputs.items():
        write(addresses[name], values)
    indices.queue_update(addresses[names.next_write_index(names.FULL)], batch)
    indices.remember(outputs)


def test_a_steps_next_indices_stay_where_the_next_step_reads_them(memory):
    indices = WriteIndices(INPUTS, 4, memory)
    addresses = indices.addresses(3)
    run_step(memory, indices, 3)
    assert stored(memory, addresses, 3) == [[9] * 3, [5] * 3]
    before = memory.num_copies
    indices.upload(feeds([9] * 3, [5] * 3))
    assert memory.num_copies == before


@pytest.mark.parametrize(
    ("full", "sparse"), [([9, 2], [5, 5]), ([9, 9], [5, 0])], ids=["full", "sparse"]
)
def test_indices_that_changed_elsewhere_are_uploaded_again(memory, full, sparse):
    indices = WriteIndices(INPUTS, 4, memory)
    addresses = indices.addresses(2)
    run_step(memory, indices, 2)
    indices.upload(feeds(full, sparse))
    assert stored(memory, addresses, 2) == [full, sparse]


def test_after_an_interrupted_step_indices_are_uploaded_again(memory):
    indices = WriteIndices(INPUTS, 4, memory)
    addresses = indices.addresses(2)
    run_step(memory, indices, 2)
    indices.upload(feeds([9, 9], [5, 5]))
    for address in addresses.values():  # the step went on, its outputs were never read
        write(address, np.array([10, 10]))
    indices.upload(feeds([9, 9], [5, 5]))
    assert stored(memory, addresses, 2) == [[9, 9], [5, 5]]


def test_after_another_batch_nothing_is_taken_for_granted(memory):
    indices = WriteIndices(INPUTS, 4, memory)
    run_step(memory, indices, 2)
    addresses = indices.addresses(3)
    indices.upload(feeds([9] * 3, [5] * 3))
    assert stored(memory, addresses, 3) == [[9] * 3, [5] * 3]


def test_a_dense_decoder_has_one_write_index(memory):
    indices = WriteIndices(INPUTS[:2], 4, memory)
    assert indices.names == (names.write_index(names.FULL),)
    addresses = indices.addresses(1)
    indices.upload({names.write_index(names.FULL): np.array([3])})
    assert stored(memory, addresses, 1) == [[3]]
