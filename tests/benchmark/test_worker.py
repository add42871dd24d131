from __future__ import annotations

import os

import pytest

from dllava_export.benchmark import subject
from dllava_export.benchmark.worker import Worker, run_alone
from dllava_export.errors import BackendError


@pytest.fixture(scope="module")
def worker(tiny_model):
    made = Worker(subject.DENSE, tiny_model)
    yield made
    made.close()


def test_measures_in_its_process(worker):
    assert worker.prefill(2) > 0
    worker.call("fill", 200)
    assert len(worker.decode(3)) == 3
    assert worker.call("logits").shape == (2, 320)
    assert "onnxruntime " in worker.facts.version


def test_memory_is_of_its_process(worker):
    memory = worker.memory()
    assert 10 << 20 < memory.rss_bytes <= memory.peak_rss_bytes


def test_what_fails_there_is_one_message(worker):
    with pytest.raises(BackendError, match=r"AttributeError: .* has no attribute 'fly'"):
        worker.call("fly")


def thread_variable(_: object) -> str:
    return os.environ["OMP_NUM_THREADS"]


def die(_: object) -> None:
    os._exit(3)


def test_process_that_ends_is_reported(tiny_model):
    with pytest.raises(BackendError, match="its process ended: it crashed, or was killed"):
        run_alone(die, tiny_model)


def test_threads_are_limited_before_anything_is_imported(tiny_model):
    assert run_alone(thread_variable, tiny_model) == "1"
