"""Registries as such: names, what other packages add, and what is refused."""

from __future__ import annotations

import abc
import re
import sys

import pytest

from dllava_export.errors import RegistryError, SettingError
from dllava_export.registries import Registry, close_match

GROUP = "dllava_export.test_shapes"
OTHER = """
from test_registries_shapes import Shape

class Star(Shape):
    name, title = "star", "a star"

    def corners(self):
        return 10

class Untitled(Star):
    title = None

class Needy(Star):
    def __init__(self, size):
        pass

star = Star()
number = 3
"""


class Shape(abc.ABC):
    """What a registry of these tests holds."""

    name: str
    title: str

    @abc.abstractmethod
    def corners(self) -> int:
        """Return how many there are."""


class Triangle(Shape):
    name, title = "triangle", "three corners"

    def corners(self) -> int:
        return 3


class Square(Shape):
    name, title = "square", "four corners"

    def corners(self) -> int:
        return 4


@pytest.fixture
def shapes(monkeypatch):
    """A registry of two shapes; packages import this module as `test_registries_shapes`."""
    monkeypatch.setitem(sys.modules, "test_registries_shapes", sys.modules[__name__])
    return Registry(
        "shape",
        GROUP,
        {
            "triangle": "test_registries_shapes:Triangle",
            "square": "test_registries_shapes:Square",
        },
        contract=Shape,
        texts=("name", "title"),
        unknown=SettingError,
        reserved=("nothing",),
    )


@pytest.fixture
def install(packages):
    """Return a function that installs a package with a shape."""

    def do(name="star", entry="Star", source=OTHER, package="p"):
        packages.install(GROUP, name, entry, source, package)

    return do


# Built-in things.


def test_gives_things_by_their_names(shapes):
    assert shapes.names() == ("triangle", "square")
    assert [shapes.get(name).corners() for name in shapes.names()] == [3, 4]
    assert [shape.name for shape in shapes.usable()] == ["triangle", "square"]
    assert shapes.find("square").corners() == shapes.find_built_in("square").corners() == 4


def test_nothing_is_imported_before_it_is_asked_for():
    absent = Registry(
        "shape",
        GROUP,
        {"absent": "no_such_module:Absent"},
        contract=Shape,
        texts=("name",),
        unknown=SettingError,
    )
    assert absent.names() == ("absent",)
    with pytest.raises(ModuleNotFoundError):
        absent.get("absent")


def test_things_may_be_looked_for_when_they_are_asked_for(shapes):
    asked = []

    def found():
        asked.append(True)
        return {"square": "test_registries_shapes:Square"}

    lazy = Registry(
        "shape", GROUP, found, contract=Shape, texts=("name",), unknown=SettingError
    )
    assert asked == []
    assert [lazy.names(), lazy.names()] == [("square",)] * 2
    assert lazy.get("square").corners() == 4
    assert asked == [True]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        pytest.param("squares", "Did you mean 'square'?", id="one is near"),
        pytest.param(
            "circle", "Is the package that provides it installed?", id="none is near"
        ),
        pytest.param("nothing", "Is the package that provides it installed?", id="reserved"),
        pytest.param("", "Is the package that provides it installed?", id="empty"),
    ],
)
def test_unknown_names_are_told_the_known_ones(shapes, name, remedy):
    message = f"shape must be one of triangle, square, got {name!r}. {remedy}"
    with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
        shapes.get(name)
    assert shapes.find(name) is None
    assert shapes.find_built_in(name) is None


def test_the_registry_says_what_kind_of_error_it_is(shapes):
    own = Registry(
        "shape",
        GROUP,
        {},
        contract=Shape,
        texts=("name",),
        unknown=lambda m: KeyError(m + "!"),
    )
    with pytest.raises(KeyError, match="Is the package that provides it installed\\?!"):
        own.get("square")


def test_the_names_to_choose_from_may_be_fewer(shapes):
    assert shapes.describe_unknown("squar", ["triangle"]) == (
        "shape must be one of triangle, got 'squar'. Is the package that provides it installed?"
    )


def test_names_that_are_near():
    assert close_match("nrom", ("norm", "random", "uniform")) == (
        "Did you mean 'norm' or 'random'?"
    )
    assert close_match("x", ("norm",)) == ""
    assert close_match("norm", ()) == ""


# Things of other packages.


@pytest.mark.parametrize("entry", ["Star", "star"], ids=["class", "instance"])
def test_another_package_adds_a_thing(shapes, install, entry):
    install(entry=entry)
    assert shapes.names() == ("triangle", "square", "star")
    assert shapes.get("star").corners() == 10
    assert shapes.find_built_in("star") is None
    assert [shape.corners() for shape in shapes.usable()] == [3, 4, 10]


def test_packages_are_looked_for_anew(shapes, install):
    with pytest.raises(SettingError, match="got 'star'"):
        shapes.get("star")
    install()
    assert shapes.get("star").corners() == 10


def test_packages_stand_in_the_order_of_their_names(shapes, install):
    install(name="star", package="a")
    install(name="circle", package="b")
    assert shapes.names() == ("triangle", "square", "circle", "star")


def test_names_near_to_those_of_packages_are_told(shapes, install):
    install()
    with pytest.raises(
        SettingError, match=r"triangle, square, star, got 'stars'. .* 'star'\?$"
    ):
        shapes.get("stars")


def test_other_groups_do_not_matter(shapes, packages):
    packages.install("dllava_export.test_colours", "star", "Star", OTHER)
    assert shapes.names() == ("triangle", "square")


# Packages that are refused.


@pytest.mark.parametrize(
    ("entry", "source", "message"),
    [
        pytest.param("Star", "import nowhere", "cannot be loaded from module_of_p:Star "
                     "(ModuleNotFoundError: No module named 'nowhere'). ", id="import"),
        pytest.param("Star", "1 / 0", "cannot be loaded from module_of_p:Star "
                     "(ZeroDivisionError: division by zero). ", id="any error"),
        pytest.param("Absent", OTHER, "cannot be loaded from module_of_p:Absent "
                     "(AttributeError: ", id="no such object"),
        pytest.param("Shape", OTHER, "cannot be loaded from module_of_p:Shape (TypeError: ",
                     id="abstract"),
        pytest.param("Needy", OTHER, "cannot be loaded from module_of_p:Needy (TypeError: ",
                     id="arguments"),
        pytest.param("number", OTHER, "is module_of_p:number, a int; expected a subclass or an "
                     "instance of tests.test_registries.Shape. ", id="another type"),
        pytest.param("Untitled", OTHER, "has {'name': 'star', 'title': None}; expected texts, "
                     "and the name of its entry point. ", id="no text"),
    ],
)  # fmt: skip
def test_says_which_package_is_broken(shapes, install, entry, source, message):
    install(entry=entry, source=source)
    with pytest.raises(RegistryError) as caught:
        shapes.get("star")
    text = str(caught.value).replace(Shape.__module__, "tests.test_registries")
    assert text.startswith(f"Shape 'star' of package p 1.5 {message}")
    assert text.endswith("Repair or uninstall the package.")


def test_a_thing_has_the_name_of_its_entry_point(shapes, install):
    install(name="comet")
    with pytest.raises(RegistryError, match=r"'comet' of package p 1\.5 has \{'name': 'star'"):
        shapes.get("comet")


def test_a_broken_package_hides_nothing_else(shapes, install, caplog):
    install(source="import nowhere")
    assert [shape.name for shape in shapes.usable()] == ["triangle", "square"]
    assert "Shape 'star' of package p 1.5 cannot be loaded from" in caplog.text
    assert shapes.names() == ("triangle", "square", "star")
    assert shapes.get("square").corners() == 4


@pytest.mark.parametrize("name", ["square", "nothing"], ids=["built in", "reserved"])
def test_names_that_are_taken(shapes, install, name):
    install(name=name)
    assert shapes.names() == ("triangle", "square")
    message = (
        f"Package p 1.5 provides a shape '{name}', but that name is taken, as are all of "
        "triangle, square, nothing. Rename it there, or uninstall the package."
    )
    with pytest.raises(RegistryError, match=f"^{re.escape(message)}$"):
        shapes.get(name)


def test_a_name_of_two_packages(shapes, install):
    install(package="p")
    install(package="q")
    with pytest.raises(
        RegistryError,
        match=r"^Packages [pq] 1\.5 and [pq] 1\.5 provide a shape 'star' each\. U",
    ):
        shapes.get("star")
    assert [shape.name for shape in shapes.usable()] == ["triangle", "square"]
