"""Settings of every command refuse values of the wrong kind by name."""

from __future__ import annotations

import dataclasses

import pytest

from dllava_export.backends.trt.build.build_options import BuildOptions
from dllava_export.cost.planning import PlanRequest
from dllava_export.errors import SettingError
from dllava_export.evaluation.settings import EvaluationSettings
from dllava_export.runtime.generation import GenerationSettings
from dllava_export.sparsity import Sparsity
from dllava_export.training.settings import TrainingSettings
from dllava_export.validation.settings import ValidationSettings

VALID = (
    BuildOptions("tensorrt-rtx"),
    EvaluationSettings(),
    GenerationSettings(),
    PlanRequest(1 << 30, 16, 16),
    Sparsity("uniform"),
    TrainingSettings(),
    ValidationSettings(),
)
NUMBERS = [
    pytest.param(settings, field.name, id=f"{type(settings).__name__}-{field.name}")
    for settings in VALID
    for field in dataclasses.fields(settings)
    if str(field.type).split(" |")[0] in ("int", "float")
]


@pytest.mark.parametrize("value", ["8", True, float("nan"), [8]], ids=repr)
@pytest.mark.parametrize(("settings", "name"), NUMBERS)
def test_a_number_of_the_wrong_kind(settings, name, value):
    with pytest.raises(SettingError, match=rf"^{name} must be"):
        dataclasses.replace(settings, **{name: value})


@pytest.mark.parametrize(("settings", "name"), NUMBERS)
def test_a_number_below_all_that_make_sense(settings, name):
    with pytest.raises(SettingError, match=rf"^{name} must be"):
        dataclasses.replace(settings, **{name: -1})
