from __future__ import annotations

import pytest

from dllava_export.backends.trt.build.machine_memory import available_bytes

MIB = 1 << 20


@pytest.fixture
def meminfo(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:  4096 kB\nMemAvailable:  2048 kB\n")
    return path


def test_what_the_machine_has(tmp_path, meminfo):
    assert available_bytes(meminfo, tmp_path) == 2 * MIB


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", 0, 2 * MIB), (3 * MIB, 2 * MIB, MIB), (8 * MIB, 0, 2 * MIB), (MIB, 2 * MIB, 0)],
)
def test_what_a_container_leaves(tmp_path, meminfo, limit, used, expected):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert available_bytes(meminfo, tmp_path) == expected


def test_system_that_does_not_tell(tmp_path):
    assert available_bytes(tmp_path / "none", tmp_path) is None
