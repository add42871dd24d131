from __future__ import annotations

import re

import pytest
import torch

from dllava_export.families.family import Renames, Traceable

RENAMES = Renames(
    (
        ("model.", "model."),
        ("model.tower.old.", ""),
        ("model.tower.", ""),
        ("model.proj.", "projector."),
    ),
    ignored=re.compile(r"model\.text\."),
)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        pytest.param("model.norm.weight", "model.norm.weight", id="shortest prefix"),
        pytest.param("model.proj.0.bias", "projector.0.bias", id="longer prefix"),
        pytest.param("model.tower.old.a", "a", id="longest prefix"),
    ],
)
def test_renames_lead_there_and_back(key, name):
    assert RENAMES.canonical(key) == name
    assert RENAMES.stored(name) == key


def test_second_spelling_is_understood_and_the_first_is_given():
    assert RENAMES.canonical("model.tower.a") == "a"
    assert RENAMES.stored("a") == "model.tower.old.a"


def test_key_without_a_name():
    assert RENAMES.canonical("lm_head.weight") is None
    assert Renames((("x.", "y."),)).stored("z.weight") == "z.weight"


def test_ignored_keys():
    assert RENAMES.is_ignored("model.text.a")
    assert not RENAMES.is_ignored("model.a")
    assert not Renames(()).is_ignored("model.text.a")


def test_shapes_are_those_of_the_module_under_canonical_names():
    module = torch.nn.Linear(3, 2, device="meta")
    traceable = Traceable(module, (), {}, (), canonical=lambda name: f"projector.0.{name}")
    assert traceable.shapes() == {"projector.0.weight": (2, 3), "projector.0.bias": (2,)}
