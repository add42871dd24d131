from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import checkpoint_factory as factory
import pytest

from dllava_export.errors import DllavaExportError, UnsupportedModelError
from dllava_export.families.llava import LlavaFamily
from dllava_export.families.registry import FAMILIES, detect_family

MODULE = """
from dllava_export.families.family import Family

class Other(Family):
    name = "{name}"
    title = "Other"
    architectures = ("OtherForConditionalGeneration",)

    def detect(self, config, *, bare_decoder=False):
        return "other" if config.get("model_type") == "other" else None

    def renames(self, config, layout, keys):
        raise NotImplementedError

    def describe(self, config, layout, **settings):
        raise NotImplementedError

instance = Other()
number = 3
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution, not really: what importlib.metadata and imports look at."""

    def do(entry="other", value="{module}:Other", name="other", package="other_vlm") -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.2\n"
        )
        target = value.format(module=package)
        (info / "entry_points.txt").write_text(f"[{FAMILIES.group}]\n{entry} = {target}\n")
        (folder / f"{package}.py").write_text(MODULE.format(name=name))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, package, raising=False)

    return do


def test_built_in_families_stand_under_their_own_names():
    assert [family.name for family in FAMILIES.usable()] == list(FAMILIES.names())
    assert isinstance(FAMILIES.get("llava"), LlavaFamily)


def test_unknown_name_is_answered_with_a_close_one():
    with pytest.raises(
        UnsupportedModelError, match=r"^family must be one of llava, got 'lava'. .* 'llava'\?"
    ):
        FAMILIES.get("lava")


def test_unknown_name_without_a_close_one():
    with pytest.raises(UnsupportedModelError, match=r"got 'qwen9'\. Is the package that"):
        FAMILIES.get("qwen9")


@pytest.mark.parametrize("value", ["{module}:Other", "{module}:instance"])
def test_another_package_brings_a_family(install, value):
    install(value=value)
    assert FAMILIES.names() == ("llava", "other")
    assert FAMILIES.get("other").title == "Other"
    family, layout = detect_family({"model_type": "other"})
    assert (family.name, layout) == ("other", "other")


def test_built_in_families_see_a_configuration_first(install):
    install(value="{module}:absent")  # never loaded
    family, layout = detect_family(factory.HF_CONFIG)
    assert (family.name, layout) == ("llava", "llava-hf")


def test_configuration_that_no_family_takes(install):
    install()
    with pytest.raises(UnsupportedModelError) as caught:
        detect_family({"model_type": "gpt2", "architectures": ["GPT2"]})
    message = str(caught.value)
    assert "model_type 'gpt2' with architectures ['GPT2'] is not supported" in message
    assert "LLaVA-1.5 or Dynamic-LLaVA (LlavaLlamaForCausalLM," in message
    assert "Other (OtherForConditionalGeneration)" in message


def test_quantised_checkpoints_are_refused_whatever_the_family():
    with pytest.raises(UnsupportedModelError, match="quant_method 'awq'"):
        detect_family({"model_type": "x", "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(UnsupportedModelError, match="quant_method 'int4'"):
        detect_family({**factory.HF_CONFIG, "quantization_config": "int4"})


def test_bare_decoder_is_taken_only_where_asked_for():
    config = {"model_type": "llama"}
    assert detect_family(config, bare_decoder=True)[1] == "llava"
    with pytest.raises(UnsupportedModelError, match=r"model_type 'llama' with .* \[\]"):
        detect_family(config)


def test_built_in_name_is_refused(install):
    install(entry="llava", name="llava")
    with pytest.raises(
        DllavaExportError, match=r"Package other-vlm 1\.2 provides a family 'llava', .* taken"
    ):
        detect_family(factory.HF_CONFIG)


def test_one_name_of_two_packages_is_refused(install):
    install()
    install(package="third_vlm")
    with pytest.raises(
        DllavaExportError, match=r"^Packages (other|third)-vlm 1\.2 and .* family 'other' each"
    ):
        FAMILIES.get("other")


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        pytest.param("no_such_module:X", "other", "ModuleNotFoundError", id="no module"),
        pytest.param("{module}:absent", "other", "AttributeError", id="no attribute"),
        pytest.param("{module}:number", "other", "is other_vlm:number, a int", id="no family"),
        pytest.param("{module}:Other", "x", "has {'name': 'x'", id="other name"),
        pytest.param(
            "dllava_export.families.family:Family", "other", "TypeError", id="abstract"
        ),
    ],
)
def test_family_that_cannot_be_loaded(install, value, name, message):
    install(value=value, name=name)
    with pytest.raises(DllavaExportError, match=r"of package other-vlm 1\.2 .*Repair or") as e:
        FAMILIES.get("other")
    assert message in str(e.value)


def test_asking_a_family_for_its_positions_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from dllava_export.families.registry import FAMILIES; "
        "FAMILIES.get('llava').positions; "
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "[]\n"
