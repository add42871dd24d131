from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from places import ROOT

from dllava_export import cli
from dllava_export.commands.policy_option import PolicyName, PolicyOption
from dllava_export.passes.policies.registry import POLICIES

BUILT_IN = [name for name in POLICIES.names() if POLICIES.find_built_in(name)]


@click.command()
@click.option(
    "--policy", cls=PolicyOption, type=PolicyName(decides_text=False), help="{policies}."
)
@click.option("--text", type=PolicyName(decides_text=True))
def command(policy: str | None, text: str | None) -> None:
    """Print what was chosen."""
    click.echo(f"{policy} {text}")


def run(*arguments: str):
    return CliRunner().invoke(command, arguments)


@pytest.mark.parametrize("name", ["predictor", "norm", "none"])
def test_takes_a_policy(name: str) -> None:
    assert run("--policy", name).output == f"{name} None\n"


@pytest.mark.parametrize("name", ["uniform", "none"])
def test_takes_a_text_policy(name: str) -> None:
    assert run("--text", name).output == f"None {name}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "unifrom"], f"policy must be one of {', '.join(BUILT_IN)}, none, got "
         "'unifrom'. Did you mean 'uniform'?"),
        (["--text", "radnom"], "policy must be one of predictor, random, uniform, none, got "
         "'radnom'. Did you mean 'random'?"),
        (["--text", "norm"], "policy 'norm' has no decision for a single token; expected one of "
         "predictor, random, uniform, none."),
    ],
)  # fmt: skip
def test_refuses_others_as_wrong_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_help_says_what_there_is(policy_packages) -> None:
    policy_packages.install("mine", "Deciding")
    text = " ".join(run("--help").output.split())
    assert f"--policy [{'|'.join(BUILT_IN)}|mine|none]" in text
    assert "uniform: evenly spaced tokens; mine: a policy of a test." in text
    assert "--text [predictor|random|uniform|mine|none]" in text


def test_takes_policies_of_other_packages(policy_packages) -> None:
    policy_packages.install("mine", "Mine")
    assert run("--policy", "mine").output == "mine None\n"


def test_help_works_beside_a_broken_package(policy_packages) -> None:
    policy_packages.install("mine", "Mine", source="import nowhere")
    assert run("--help").exit_code == 0


def test_a_broken_package_is_named(policy_packages) -> None:
    policy_packages.install("mine", "Mine", source="import nowhere")
    result = run("--policy", "mine")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Policy 'mine' of package p 1.5 cannot be loaded")


def test_names_can_be_completed() -> None:
    (option, _, _) = command.get_params(click.Context(command))
    items = option.type.shell_complete(click.Context(command), option, "n")
    assert [item.value for item in items] == ["norm", "none"]


@pytest.mark.parametrize("name", ["export", "sparsify"])
def test_commands_have_both_options(name: str) -> None:
    text = CliRunner().invoke(cli.main, [name, "--help"]).output
    assert f"--policy [{'|'.join(BUILT_IN)}|none]" in " ".join(text.split())
    assert "--output-text-policy [predictor|random|uniform|none]" in text


def test_help_of_all_commands_looks_for_nothing() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from dllava_export import cli\n"
        "print(CliRunner().invoke(cli.main, ['--help']).exit_code)\n"
        "heavy = ('importlib.metadata', 'numpy', 'onnx', 'onnx_graphsurgeon')\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "0\n[]\n"
