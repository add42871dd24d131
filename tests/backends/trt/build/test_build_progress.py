from __future__ import annotations

import pytest

from dllava_export.backends.trt.build.build_progress import progress_monitor


@pytest.fixture
def trt():
    return pytest.importorskip("tensorrt_rtx")


def test_counts_the_steps_of_the_outermost_phase(trt, capsys):
    monitor = progress_monitor(trt, "decoder", show=True)
    monitor.phase_start("Building", None, 4)
    monitor.phase_start("Optimizing", "Building", 30)
    monitor.phase_start("Timing", "Optimizing", 2)
    assert monitor.step_complete("Building", 0)
    assert monitor.step_complete("Optimizing", 0)
    monitor.phase_finish("Optimizing")
    assert monitor._bar.n == 1
    monitor.phase_finish("Building")
    monitor.close()
    shown = capsys.readouterr().err
    assert "decoder: Optimizing" in shown
    assert "Timing" not in shown
    assert "4/4" in shown


def test_shows_nothing_unless_asked(trt, capsys):
    monitor = progress_monitor(trt, "decoder", show=False)
    monitor.phase_start("Building", None, 4)
    assert monitor.step_complete("Building", 0)
    monitor.phase_finish("Building")
    monitor.close()
    assert capsys.readouterr().err == ""


def test_interrupt_stops_the_build(trt, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monitor = progress_monitor(trt, "decoder", show=False)
    monitor.phase_start("Building", None, 4)
    monkeypatch.setattr(monitor._bar, "update", interrupt)
    assert monitor.step_complete("Building", 0) is False
    assert monitor.was_interrupted
