from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import pytest
from planted import change_one_weight, plant

from dllava_export.backends.registry import BACKENDS
from dllava_export.validation.graph_inputs import save_graph_inputs
from dllava_export.validation.polygraphy_extension import argument_groups
from dllava_export.validation.settings import ValidationSettings

# The script `polygraphy` need not be on the PATH, and the package has no `__main__`.
POLYGRAPHY = "import sys, polygraphy.tools; sys.exit(polygraphy.tools.main())"


def polygraphy(*arguments):
    """Run polygraphy's own command line in a process of its own."""
    command = [sys.executable, "-c", POLYGRAPHY, *(str(each) for each in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def saved(bundles, tmp_path_factory):
    """Return what was saved for a bundle, by checkpoint and precision."""
    folder = tmp_path_factory.mktemp("saved")

    def save(checkpoint, precision):
        out = folder / f"{checkpoint}_{precision}"
        if out not in done:
            settings = ValidationSettings(num_steps=3, num_threads=1)
            done[out] = save_graph_inputs(bundles.path(checkpoint, precision), out, settings)
        return done[out]

    done = {}
    return save


@pytest.mark.parametrize(
    ("checkpoint", "precision", "uses"),
    [
        ("mha", "fp32", ["visual", "decoder_prefill", "recompute", "dense"]),
        ("gqa", "fp32", ["decoder_decode"]),
        ("mha", "fp16", ["decoder_prefill"]),
    ],
    ids=["mha", "gqa", "fp16"],
)
def test_the_commands_that_are_printed_pass(saved, checkpoint, precision, uses):
    inputs = saved(checkpoint, precision)
    for each in inputs.files:
        if each.file.stem in uses:
            done = polygraphy(*shlex.split(inputs.command(each))[1:])
            assert done.returncode == 0, done.stdout + done.stderr
            assert "FAILED" not in done.stdout
            assert ("Pass Rate: 100.00%" in done.stdout) == (each.file.stem != "dense")


def test_a_changed_weight_fails_the_comparison(bundles, saved, tmp_path):
    inputs = saved("mha", "fp32").files[2].file  # a decode step
    outputs = tmp_path / "outputs.json"
    load = ["--load-inputs", inputs, "--atol", "2e-4", "--rtol", "1e-4"]
    model = bundles.path("mha") / "llm/model.onnx"
    done = polygraphy("run", model, "--onnxrt", *load, "--save-outputs", outputs)
    assert done.returncode == 0, done.stdout
    change = change_one_weight("model.layers.3.mlp.down_proj.weight")
    planted = plant(bundles.path("mha"), tmp_path / "planted", change) / "llm/model.onnx"
    for path, verdict in ((model, "PASSED"), (planted, "FAILED")):
        arguments = ["--dllava-onnxruntime", *load, "--load-outputs", outputs]
        done = polygraphy("run", path, *arguments)
        assert done.returncode == (verdict == "FAILED"), done.stdout
        assert f"{verdict} | Runtime" in done.stdout


def test_help_lists_every_backend():
    done = polygraphy("run", "--help")
    for option in ("onnxruntime", "tensorrt", "tensorrt-rtx", "provider {cpu,cuda}"):
        assert f"--dllava-{option}" in done.stdout


def test_a_broken_package_does_not_hide_the_backends(packages, caplog):
    packages.install(BACKENDS.group, "mine", "Mine", source="import nowhere")
    groups = argument_groups()
    parser = argparse.ArgumentParser()
    groups[0].group = parser
    groups[0].add_parser_args_impl()
    assert "--dllava-provider" in parser.format_help()
    assert [group.get_name_opt_impl()[1] for group in groups[1:]] == [
        "dllava-onnxruntime",
        "dllava-tensorrt-rtx",
        "dllava-tensorrt",
    ]
    assert "Backend 'mine' of package p 1.5 cannot be loaded" in caplog.text


def test_a_generated_script_says_where_it_computes(bundles):
    model = bundles.path("mha") / "llm/model.onnx"
    arguments = ["--dllava-onnxruntime", "--dllava-tensorrt", "--dllava-provider", "cuda"]
    script = polygraphy("run", model, *arguments, "--gen-script", "-").stdout
    given = "'onnxruntime', options={'provider': 'cuda'}"
    assert f"BackendRunner({str(model)!r}, {given})," in script
    assert f"BackendRunner({str(model)!r}, 'tensorrt', options={{}})," in script


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_that_cannot_run_says_why_and_exits_with_1(bundles, saved, backend):
    inputs = saved("mha", "fp32").files[1].file
    model = bundles.path("mha") / "llm/model.onnx"
    done = polygraphy("run", model, f"--dllava-{backend}", "--load-inputs", inputs)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("[!]")]
    assert len(errors) == 1
    assert "cannot be imported" in errors[0] or "has no engines" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
