"""One model of random weights for all tests of the suite."""

from __future__ import annotations

import pytest
from tiny_suite import SETTINGS, TINY

from dllava_export.benchmark.random_model import RandomModel, make_random_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> RandomModel:
    return make_random_model(TINY, SETTINGS, tmp_path_factory.mktemp("random_model"))
