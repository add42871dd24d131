from __future__ import annotations

import re
import subprocess
import sys

import pytest
from places import ROOT
from policy_package import POLICY

from dllava_export.errors import DllavaExportError
from dllava_export.passes.policies.base import Policy
from dllava_export.passes.policies.registry import (
    POLICIES,
    check_text_policy,
    text_policy_names,
    untrained_policy_names,
)

BUILT_IN = tuple(name for name in POLICIES.names() if POLICIES.find_built_in(name))
ALL = ", ".join(BUILT_IN)


# Built-in policies.


def test_knows_its_policies() -> None:
    files = {path.stem for path in (ROOT / "passes" / "policies").glob("*.py")}
    shared = {"__init__", "base", "registry", "scores", "paid_attention", "weights"}
    homes = {type(POLICIES.get(name)).__module__.rpartition(".")[2] for name in BUILT_IN}
    assert homes == files - shared
    assert list(BUILT_IN) == sorted(BUILT_IN)
    assert [policy.name for policy in POLICIES.usable()] == list(BUILT_IN)
    assert text_policy_names() == ("predictor", "random", "uniform")
    assert untrained_policy_names() == tuple(n for n in BUILT_IN if n != "predictor")


def test_a_new_file_is_a_policy(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(POLICY, encoding="utf-8")
    code = (
        "from dllava_export.passes import policies\n"
        f"policies.__path__.append({str(tmp_path)!r})\n"
        "from dllava_export.passes.policies.registry import POLICIES\n"
        "print(POLICIES.get('mine').help)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "a policy of a test\n"


@pytest.mark.parametrize("name", BUILT_IN)
def test_gives_a_policy_by_its_name(name: str) -> None:
    policy = POLICIES.get(name)
    assert policy.name == name
    assert policy.help
    assert not policy.help.endswith(".")


def test_imports_nothing_heavy() -> None:
    """A bundle's settings ask the registry wherever a bundle runs."""
    code = (
        "import sys\n"
        "from dllava_export.sparsity import Sparsity\n"
        "Sparsity('uniform')\n"
        "from dllava_export.passes.policies import registry\n"
        "print(len(list(registry.POLICIES.usable())))\n"
        "print([m for m in ('onnx', 'onnx_graphsurgeon', 'torch') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"{len(BUILT_IN)}\n[]\n"


# What is refused.


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("unifrom", "Did you mean 'uniform'?"),
        ("nrom", "Did you mean 'norm' or 'random'?"),
        ("nowhere", "Is the package that provides it installed?"),
        ("none", "Is the package that provides it installed?"),
    ],
)
def test_names_what_comes_close(name: str, remedy: str) -> None:
    message = f"policy must be one of {ALL}, got {name!r}. {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        POLICIES.get(name)
    assert POLICIES.find(name) is None


@pytest.mark.parametrize("rate", [0, 1, -0.5, 1.5])
def test_refuses_rates_that_need_no_decision(rate: float) -> None:
    with pytest.raises(ValueError, match=r"^keep_rate must be in \(0, 1\), got "):
        check_text_policy("random", rate)


def test_refuses_policies_without_a_decision() -> None:
    with pytest.raises(
        ValueError, match=r"^policy 'norm' has no decision .* of predictor, rand"
    ):
        check_text_policy("norm", 0.5)
    with pytest.raises(ValueError, match="policy must be one of"):
        check_text_policy("none", 0.5)


# Policies of other packages.


@pytest.mark.parametrize("entry", ["Mine", "mine"], ids=["class", "instance"])
def test_finds_policies_of_other_packages(policy_packages, entry: str) -> None:
    policy_packages.install("mine", entry)
    assert POLICIES.names() == (*BUILT_IN, "mine")
    assert isinstance(POLICIES.get("mine"), Policy)
    assert "mine" in untrained_policy_names()
    assert "mine" not in text_policy_names()
    assert POLICIES.find_built_in("mine") is None


def test_they_may_decide_about_text(policy_packages) -> None:
    policy_packages.install("mine", "Deciding")
    assert text_policy_names()[-1] == "mine"
    check_text_policy("mine", 0.5)


@pytest.mark.parametrize(
    ("entry", "source", "message"),
    [
        pytest.param("Mine", "import nowhere", "cannot be loaded from module_of_p:Mine "
                     "(ModuleNotFoundError: No module named 'nowhere')", id="import"),
        pytest.param("Mine", "1 / 0", "cannot be loaded from module_of_p:Mine "
                     "(ZeroDivisionError: division by zero)", id="any error"),
        pytest.param("Mine", "", "cannot be loaded from module_of_p:Mine (AttributeError: ",
                     id="no such object"),
        pytest.param("Policy", None, "cannot be loaded from module_of_p:Policy (TypeError: ",
                     id="abstract"),
        pytest.param("number", None, "is module_of_p:number, a int; expected a subclass or "
                     "an instance of dllava_export.passes.policies.base.Policy.", id="no policy"),
    ],
)  # fmt: skip
def test_says_which_package_is_broken(policy_packages, entry, source, message) -> None:
    policy_packages.install("mine", entry, **({} if source is None else {"source": source}))
    with pytest.raises(DllavaExportError) as caught:
        POLICIES.get("mine")
    text = str(caught.value)
    assert text.startswith(f"Policy 'mine' of package p 1.5 {message}")
    assert text.endswith("Repair or uninstall the package.")


def test_the_name_must_be_that_of_the_entry_point(policy_packages) -> None:
    policy_packages.install("other", "Mine")
    with pytest.raises(
        DllavaExportError, match=r"'other' of package p 1\.5 has \{'name': 'mine'"
    ):
        POLICIES.get("other")


def test_a_broken_package_does_not_hide_the_others(policy_packages, caplog) -> None:
    policy_packages.install("mine", "Mine", source="import nowhere")
    assert text_policy_names() == ("predictor", "random", "uniform")
    assert "Policy 'mine' of package p 1.5 cannot be loaded" in caplog.text
    assert POLICIES.get("norm").name == "norm"


@pytest.mark.parametrize("name", ["norm", "none"])
def test_built_in_names_are_taken(policy_packages, name: str) -> None:
    policy_packages.install(name, "Mine")
    assert POLICIES.names() == BUILT_IN
    message = (
        f"Package p 1.5 provides a policy '{name}', but that name is taken, as are all of "
        f"{ALL}, none. Rename it there, or uninstall the package."
    )
    with pytest.raises(DllavaExportError, match=f"^{re.escape(message)}$"):
        POLICIES.get(name)


def test_two_packages_cannot_provide_one_policy(policy_packages) -> None:
    policy_packages.install("mine", "Mine", package="p")
    policy_packages.install("mine", "Mine", package="q")
    message = (
        r"^Packages (p 1\.5 and q|q 1\.5 and p) 1\.5 provide a policy 'mine' each\. Unins"
    )
    with pytest.raises(DllavaExportError, match=message):
        POLICIES.get("mine")
