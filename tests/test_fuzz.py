"""A little of `tests/fuzz.py`, with a fixed seed."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from fuzz_mutations import mutated_bytes, mutated_json
from places import ROOT

NOT_YET: set[str] = set()
"""Readers whose exceptions are known; remove a name with the last of them."""


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    """One run of all readers in a process of its own: fuzzing forks."""
    command = [sys.executable, ROOT / "tests" / "fuzz.py", "--json", "--inputs", "25"]
    done = subprocess.run(
        [*command, "--minutes", "4"], capture_output=True, text=True, check=True
    )
    sys.stderr.write(done.stderr)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_nothing_comes_out_but_results_and_our_errors(counts):
    for reader, found in counts.items():
        faults = {name: found[name] for name in ("raw exceptions", "hangs", "writes outside")}
        if reader in NOT_YET:
            del faults["raw exceptions"]
        assert not any(faults.values()), (reader, faults)


@pytest.mark.slow
def test_every_reader_accepts_some_and_refuses_some(counts):
    assert len(counts) == 12
    for reader, found in counts.items():
        assert found["inputs"] >= 7, reader
        assert found["our errors"] > 0, reader
    assert sum(found["accepted"] for found in counts.values()) > 20


def test_mutations_follow_from_the_seed():
    data = json.dumps({"a": [1, {"b": "c"}], "d": 0.5}).encode()
    for mutation in (mutated_bytes, mutated_json):
        first, second = (
            [mutation(random.Random(f"0/{number}"), data) for number in range(200)]
            for _ in range(2)
        )
        assert first == second
        assert len(set(first)) > 100
        assert data not in first[:5]
