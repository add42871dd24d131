from __future__ import annotations

import hashlib
import os

import pytest

from dllava_export.bundles.digests import (
    BlockDigest,
    DigestingFile,
    file_entry,
    is_unchanged,
    whole_digest,
)

MIB = 1 << 20
LARGE = 300 * MIB  # above 256, a hole in the file


def expected_digest(data: bytes) -> str:
    blocks = (data[i : i + 8 * MIB] for i in range(0, len(data), 8 * MIB))
    return hashlib.sha256(b"".join(hashlib.sha256(b).digest() for b in blocks)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 100 * MIB + 5])
def test_digests_of_blocks_make_one_digest(tmp_path, size):
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    (tmp_path / "file").write_bytes(data)
    assert whole_digest(tmp_path / "file") == expected_digest(data)


@pytest.mark.parametrize("piece", [3 * MIB + 1, 16 * MIB, 30 * MIB])
def test_a_file_is_digested_while_it_is_written(tmp_path, piece):
    data = os.urandom(30 * MIB)
    with (tmp_path / "file").open("wb") as raw, BlockDigest() as digest:
        file = DigestingFile(raw, digest)
        for start in range(0, len(data), piece):
            file.write(data[start : start + piece])
        assert file.tell() == len(data)
        assert digest.hexdigest() == expected_digest(data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_small_file_has_the_digest_that_sha256sum_prints(tmp_path):
    (tmp_path / "file").write_bytes(b"graph")
    expected = {"size": 5, "sha256": hashlib.sha256(b"graph").hexdigest()}
    assert file_entry(tmp_path / "file") == expected


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(LARGE)
    yield path
    path.unlink()


def poke(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")


def test_a_large_file_has_two_digests(large):
    entry = file_entry(large)
    assert entry.keys() == {"size", "sha256", "sampled", "blocks_sha256"}
    assert entry["blocks_sha256"] == whole_digest(large)
    assert file_entry(large, "known")["blocks_sha256"] == "known"


@pytest.mark.parametrize(
    ("offset", "is_quick"),
    [
        pytest.param(0, True, id="first byte"),
        pytest.param(LARGE - 1, True, id="last byte"),
        pytest.param((LARGE - MIB) // 63, True, id="second sample"),
        pytest.param(3 * MIB, False, id="between samples"),
    ],
)
def test_the_full_check_sees_every_byte(large, offset, is_quick):
    entry = file_entry(large)
    assert is_unchanged(large, entry, full=True)
    poke(large, offset)
    assert is_unchanged(large, entry, full=False) is not is_quick
    assert not is_unchanged(large, entry, full=True)


def test_an_entry_of_version_1_has_samples_only(large):
    entry = file_entry(large)
    del entry["blocks_sha256"]
    assert is_unchanged(large, entry, full=True)
    poke(large, 0)
    assert not is_unchanged(large, entry, full=True)
