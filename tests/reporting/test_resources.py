from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dllava_export.reporting import resources
from dllava_export.reporting.resources import (
    ResourceUsage,
    StageUsage,
    measure_resources,
    stage,
)

MIB = 2**20
on_linux = pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="/proc says memory and bytes written"
)


@on_linux
def test_counts_bytes_written(tmp_path):
    with measure_resources() as meter:
        (tmp_path / "before").write_bytes(bytes(MIB))
        with stage("writing"):
            (tmp_path / "file").write_bytes(bytes(3 * MIB))
        (tmp_path / "link").hardlink_to(tmp_path / "file")
        usage = meter.usage()
    assert usage.bytes_written == pytest.approx(4 * MIB, abs=10_000)
    assert usage.stages[0].bytes_written == pytest.approx(3 * MIB, abs=10_000)


@on_linux
def test_counts_what_ended_processes_wrote(tmp_path):
    code = f"open({str(tmp_path / 'file')!r}, 'wb').write(bytes({2 * MIB}))"
    with measure_resources() as meter:
        subprocess.run([sys.executable, "-c", code], check=True)
        written = meter.usage().bytes_written
    assert written == pytest.approx(2 * MIB, abs=10_000)


def measured_alone(code: str) -> dict:
    """Run code in a process of its own; return what it prints."""
    text = (
        "import json\n"
        "from dllava_export.reporting.resources import measure_resources, stage\n"
        "with measure_resources() as meter:\n"
        f"{code}\n"
        "    print(json.dumps(meter.usage().to_json()))\n"
    )
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@on_linux
def test_peak_belongs_to_the_stage_that_raised_it():
    # A block of this size goes back to the system at once when it is freed.
    usage = measured_alone(
        "    with stage('small'): pass\n"
        f"    with stage('large'): block = bytearray({200 * MIB}); del block\n"
    )
    small, large = usage["stages"]
    assert large["peak_rss_bytes"] - small["peak_rss_bytes"] > 190 * MIB
    assert large["rss_bytes"] - small["rss_bytes"] < 50 * MIB
    assert usage["peak_rss_bytes"] >= large["peak_rss_bytes"]


@on_linux
def test_peak_is_that_of_the_process_not_of_its_parent():
    block = bytearray(400 * MIB)
    usage = measured_alone("    pass")
    assert usage["peak_rss_bytes"] < 200 * MIB < len(block)


@on_linux
def test_children_of_the_shell_before_do_not_count():
    earlier = f"import subprocess, sys; block = bytearray({400 * MIB})"
    own = (
        "from dllava_export.reporting.resources import measure_resources\n"
        "with measure_resources() as meter: pass\n"
        "print(meter.usage().peak_rss_bytes)"
    )
    script = '"$0" -c "$1"; exec "$0" -c "$2"'
    command = ["bash", "-c", script, sys.executable, earlier, own]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * MIB


def test_stages_are_listed_as_they_begin_with_their_depth():
    with measure_resources() as meter:
        with stage("outer"):
            with stage("inner"):
                pass
        with stage("next"):
            pass
    stages = meter.usage().stages
    assert [(s.name, s.depth) for s in stages] == [("outer", 0), ("inner", 1), ("next", 0)]
    assert stages[0].seconds >= stages[1].seconds


def test_a_stage_that_fails_is_counted():
    with measure_resources() as meter:
        with pytest.raises(OSError, match="disk full"), stage("writing"):
            raise OSError("disk full")
        with stage("cleaning up"):
            pass
    assert [(s.name, s.depth) for s in meter.usage().stages] == [
        ("writing", 0),
        ("cleaning up", 0),
    ]


def test_stages_report_to_the_innermost_meter_only():
    with stage("nobody measures"):
        pass
    with measure_resources() as outer:
        with measure_resources() as inner, stage("inside"):
            pass
        with stage("outside"):
            pass
    assert [s.name for s in inner.usage().stages] == ["inside"]
    assert [s.name for s in outer.usage().stages] == ["outside"]


USAGE = ResourceUsage(
    seconds=12.34,
    peak_rss_bytes=600 * MIB,
    bytes_written=1536,
    stages=(
        StageUsage("reading", 0, 2.0, 100 * MIB, 150 * MIB, 512),
        StageUsage("headers", 1, 1.5, 90 * MIB, 150 * MIB, 512),
        StageUsage("writing", 0, 9.0, 300 * MIB, 600 * MIB, 900),
    ),
)


def test_one_line():
    assert USAGE.to_text() == "took 12.3 s; peak RSS 600.0 MiB; 1.5 KiB written"


def test_table_of_stages():
    assert USAGE.stages_text().splitlines() == [
        "stage         time  RSS at end  peak RSS so far    written",
        "reading     2.00 s   100.0 MiB        150.0 MiB  512 bytes",
        "  headers   1.50 s    90.0 MiB        150.0 MiB  512 bytes",
        "writing     9.00 s   300.0 MiB        600.0 MiB  900 bytes",
        "other       1.34 s                               124 bytes",
        "in all     12.34 s                    600.0 MiB    1.5 KiB",
    ]


def test_says_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "PROC", tmp_path)
    monkeypatch.setitem(sys.modules, "resource", None)
    with measure_resources() as meter, stage("anything"):
        pass
    usage = meter.usage()
    assert (usage.peak_rss_bytes, usage.bytes_written) == (None, None)
    assert usage.to_text().endswith("peak RSS unknown; unknown written")
    assert usage.stages_text().splitlines()[1].split()[-3:] == ["unknown"] * 3
