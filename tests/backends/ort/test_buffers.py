from __future__ import annotations

import ctypes
import types

import ml_dtypes
import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest

from dllava_export.backends.ort.buffers import BoundRun, CacheBuffer, numpy_type
from dllava_export.errors import BackendError

# Adds x to the cache in place, and doubles x.
ACCUMULATE = """<ir_version: 10, opset_import: ["" : 21]>
g (float[b, 1, 2, 1] "past_key_values.0.key", float[b, 1, 2, 1] x)
    => (float[b, 1, 2, 1] "present.0.key", float[b, 1, 2, 1] doubled)
{ "present.0.key" = Add("past_key_values.0.key", x) doubled = Add(x, x) }"""
PAST = "past_key_values.0.key"
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def session():
    model = onnx.parser.parse_model(ACCUMULATE).SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def rows(*values):
    return np.array(values, np.float32).reshape(-1, 1, 2, 1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tensor(float)", np.float32),
        ("tensor(float16)", np.float16),
        ("tensor(bfloat16)", ml_dtypes.bfloat16),
        ("tensor(int64)", np.int64),
        ("tensor(bool)", np.bool_),
    ],
)
def test_types_are_read_from_onnx_runtimes_names(name, dtype):
    assert numpy_type(name) == np.dtype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_cache_starts_with_zeros(dtype):
    cache = CacheBuffer((2, 3, 4, 8), np.dtype(dtype), "cpu")
    values = cache.numpy()
    assert values.dtype == np.dtype(dtype)
    assert values.shape == (2, 3, 4, 8)
    assert (values.astype(np.float32) == 0).all()


def test_one_samples_part_starts_at_its_own_address():
    cache = CacheBuffer((3, 2, 5, 8), np.dtype(np.float16), "cpu")
    address, shape = cache.sample(2)
    assert shape == (1, 2, 5, 8)
    assert address == cache.numpy()[2:].ctypes.data


@pytest.mark.parametrize("capacity", [3, 7])
def test_a_buffer_takes_over_the_rows_that_fit(capacity):
    old = CacheBuffer((2, 1, 5, 1), FLOAT32, "cpu")
    old.numpy()[...] = np.arange(10).reshape(2, 1, 5, 1)
    new = CacheBuffer((2, 1, capacity, 1), FLOAT32, "cpu")
    new.write_rows(old.numpy())
    kept = min(capacity, 5)
    assert np.array_equal(new.numpy()[:, :, :kept], old.numpy()[:, :, :kept])
    assert (new.numpy()[:, :, kept:] == 0).all()


def test_a_cache_is_updated_in_place(session):
    cache = CacheBuffer((2, 1, 2, 1), FLOAT32, "cpu")
    run = BoundRun(
        "test", session, {"x": rows(1, 2, 3, 4)}, {"doubled": (2, 1, 2, 1)}, {PAST: cache}
    )
    first = run.run()
    run.update({"x": rows(10, 20, 30, 40)})
    second = run.run()
    assert first["doubled"].ravel().tolist() == [
        2,
        4,
        6,
        8,
    ]  # not overwritten by the second run
    assert second["doubled"].ravel().tolist() == [20, 40, 60, 80]
    assert cache.numpy().ravel().tolist() == [11, 22, 33, 44]
    assert set(first) == {"doubled"}


def test_inputs_are_copied(session):
    cache = CacheBuffer((1, 1, 2, 1), FLOAT32, "cpu")
    values = rows(1, 2)
    run = BoundRun("test", session, {"x": values}, {"doubled": (1, 1, 2, 1)}, {PAST: cache})
    run.update({"x": rows(5, 6)})
    assert values.ravel().tolist() == [1, 2]


def test_one_sample_runs_on_its_part_of_a_cache(session):
    cache = CacheBuffer((3, 1, 2, 1), FLOAT32, "cpu")
    inputs, shapes = {"x": rows(7, 8)}, {"doubled": (1, 1, 2, 1)}
    BoundRun("test", session, inputs, shapes, {PAST: cache}, sample=1).run()
    assert cache.numpy().ravel().tolist() == [0, 0, 7, 8, 0, 0]


def test_a_failing_run_names_graph_and_shapes(session):
    cache = CacheBuffer((3, 1, 2, 1), FLOAT32, "cpu")
    run = BoundRun(
        "decoder", session, {"x": rows(1, 2, 3, 4)}, {"doubled": (2, 1, 2, 1)}, {PAST: cache}
    )
    with pytest.raises(
        BackendError, match=r"failed in the decoder graph: .* Inputs: x 2x1x2x1\."
    ):
        run.run()


class CopyingBinding:
    """Takes inputs over when they are bound, as ONNX Runtime's binding does on a GPU."""

    def __init__(self, binding):
        self._binding = binding
        self.taken = []

    def bind_input(self, name, device, device_id, element_type, shape, address):
        if device == "cpu":
            num_bytes = int(np.prod(shape)) * FLOAT32.itemsize
            self.taken.append(np.frombuffer(ctypes.string_at(address, num_bytes), np.uint8))
            address = self.taken[-1].ctypes.data
        self._binding.bind_input(name, "cpu", device_id, element_type, shape, address)

    def bind_output(self, name, device, *rest):
        self._binding.bind_output(name, "cpu", *rest)

    def synchronize_inputs(self):
        self._binding.synchronize_inputs()

    def synchronize_outputs(self):
        self._binding.synchronize_outputs()


def test_new_values_reach_a_binding_that_copied_the_old_ones(session):
    cache = CacheBuffer((2, 1, 2, 1), FLOAT32, "cpu")
    cache.device = "cuda"
    copying = types.SimpleNamespace(
        io_binding=lambda: CopyingBinding(session.io_binding()),
        get_inputs=session.get_inputs,
        get_outputs=session.get_outputs,
        run_with_iobinding=lambda binding: session.run_with_iobinding(binding._binding),
    )
    run = BoundRun(
        "test", copying, {"x": rows(1, 2, 3, 4)}, {"doubled": (2, 1, 2, 1)}, {PAST: cache}
    )
    assert run.run()["doubled"].ravel().tolist() == [2, 4, 6, 8]
    run.update({"x": rows(10, 20, 30, 40)})
    assert run.run()["doubled"].ravel().tolist() == [20, 40, 60, 80]
