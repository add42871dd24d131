from __future__ import annotations

import pytest
from counted_bundle import make_counted_bundle

from dllava_export.cost.planning import PlanRequest, plan_memory
from dllava_export.cost.planning_plot import plot_plan

GIB = 2**30


@pytest.fixture(params=[1, 10**6], ids=["fits", "does not fit"])
def plan(request, tmp_path):
    make_counted_bundle(tmp_path / "out")
    return plan_memory(tmp_path / "out", PlanRequest(GIB, 20, 400, request.param))


def test_draws_a_picture(plan, tmp_path):
    plot_plan(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_says_how_many_fit(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    plot_plan(plan, tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    for form in (plan.dense, plan.sparse):
        assert f": {form.largest_batch}<" in text
    assert "20 prompt tokens, 6 of them of an image, 400 new ones; GPU with 1.00 GiB" in text


def test_refuses_another_format(plan, tmp_path):
    with pytest.raises(ValueError, match=r"suffix '\.txt', expected one of"):
        plot_plan(plan, tmp_path / "plan.txt")
    assert not (tmp_path / "plan.txt").exists()
