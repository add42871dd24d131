from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from golden import DATA
from planted import change_one_weight, plant

from dllava_export import cli

MHA = str(DATA / "mha")
SHORT = ["--steps", "2", "--threads", "1"]


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["validate", *(str(a) for a in arguments), *SHORT])


def test_a_match_exits_with_0_and_writes_what_was_asked(bundles, tmp_path):
    numbers, figure = tmp_path / "out.json", tmp_path / "out.png"
    result = invoke(
        bundles.path("mha"),
        "--against",
        "dense",
        "--layers",
        "--json",
        numbers,
        "--plot",
        figure,
    )
    assert (result.exit_code, result.exception) == (0, None), result.output
    assert "MATCH:" in result.stdout
    assert json.loads(numbers.read_text())["passed"] is True
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {numbers}\nDrew {figure}\n" in result.stdout


def test_a_mismatch_exits_with_1_and_writes_all_the_same(bundles, tmp_path):
    change = change_one_weight("model.layers.3.mlp.down_proj.weight")
    path = plant(bundles.path("mha"), tmp_path / "planted", change)
    numbers = tmp_path / "out.json"
    arguments = ["--against", "torch", "--checkpoint", MHA, "--json", numbers]
    result = invoke(path, *arguments)
    assert result.exit_code == 1
    assert "The first is prefill/logits" in result.stdout
    assert "Traceback" not in result.output
    assert json.loads(numbers.read_text())["first_mismatch"] == "prefill/logits"


def test_inputs_are_written_before_what_is_compared(bundles, tmp_path):
    change = change_one_weight("model.layers.3.mlp.down_proj.weight")
    path = plant(bundles.path("mha"), tmp_path / "planted", change)
    arguments = ["--against", "torch", "--checkpoint", MHA]
    result = invoke(path, *arguments, "--save-inputs", tmp_path / "inputs")
    assert result.exit_code == 1
    assert result.stdout.startswith("Wrote inputs of every graph (random values, seed 0):\n")
    assert f"--load-inputs {tmp_path}/inputs/decoder_decode.json" in result.stdout
    assert "decode step 2\n" in result.stdout
    assert len(list((tmp_path / "inputs").iterdir())) == 5


def test_tolerances_are_taken(bundles):
    arguments = ["--rtol", "0", "--atol", "0", "--check-error-stat", "max", "--margin", "0.5"]
    result = invoke(bundles.path("mha"), *arguments)
    assert result.exit_code == 1  # two kernels never agree to the last bit
    assert "tolerances  rtol 0, atol 0, max; margin 0.5" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--against", "torch"], 2, "--against torch and --checkpoint go together"),
        (["--checkpoint", "x"], 2, "--against torch and --checkpoint go together"),
        (["--rtol", "-1"], 2, "-1.0 is not in the range x>=0"),
        (["--json", "missing/out.json"], 2, "folder 'missing' does not exist"),
        (["--save-inputs", "missing/inputs"], 2, "folder 'missing' does not exist"),
        (["--plot", "out.bmp"], 1, "expected one of .png, .svg, .pdf"),
        ([], 1, "expected a bundle"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(tmp_path, arguments, exit_code, message):
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == exit_code
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
