from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import checkpoint_factory as factory
import full_disk
import pytest
from click.testing import CliRunner, Result
from places import ROOT

from dllava_export import cli
from dllava_export.benchmark import bench as bench_module
from dllava_export.benchmark.bench_report import BenchReport, Measurement
from dllava_export.benchmark.bench_settings import BenchSettings
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest
from dllava_export.exporting import sparsifier
from dllava_export.sparsity import Sparsity
from dllava_export.version import __version__

CAT = str(ROOT / "examples" / "cat.png")
COMMANDS = (
    "export",
    "sparsify",
    "run",
    "chat",
    "inspect",
    "plan",
    "bench",
    "build",
    "validate",
    "train-predictors",
    "evaluate",
    "visualize",
    "doctor",
)
WITH_IMAGE = ["--input-ids", "1,-200,15,27", "--image", CAT]
SHORT = ["--max-new-tokens", "3"]


@pytest.fixture(autouse=True)
def log_level():
    """Put back what -v and -q change."""
    logger = logging.getLogger("dllava_export")
    level = logger.level
    yield
    logger.setLevel(level)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert (result.exit_code, result.exception) == (0, None), result.output
    return result


def notes(result: Result) -> str:
    """Return stderr without its last line, which says what the command took."""
    *lines, last = result.stderr.splitlines(keepends=True)
    assert re.fullmatch(r"[a-z-]+ took \d+\.\d s; peak RSS .+; .+ written\n", last)
    return "".join(lines)


def assert_fails(exit_code: int, *parts: str, arguments: list[object]) -> None:
    """Check exit code and message; stdout holds no result."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code, result.output
    message = " ".join(result.stderr.split())
    for part in parts:
        assert part in message
    assert "Traceback" not in result.output
    assert result.stdout == ""


def changed(source: Path, out: Path, **values: object) -> Path:
    """Copy a bundle and replace values of its manifest."""
    shutil.copytree(source, out)
    path = out / layout.MANIFEST
    manifest = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**manifest, **values}))
    return out


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny Dynamic-LLaVA checkpoint."""
    factory.make_checkpoint(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def plain(tmp_path):
    """A tiny LLaVA checkpoint."""
    factory.make_checkpoint(tmp_path / "in", "llava")
    return tmp_path / "in"


# Help.


def test_help_needs_no_heavy_imports():
    heavy = ("torch", "onnxruntime", "transformers", "matplotlib", "onnx", "tensorrt")
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from dllava_export.cli import main\n"
        "for arguments in ([], *([name] for name in main.commands)):\n"
        "    result = CliRunner().invoke(main, [*arguments, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_lists_every_command():
    assert tuple(cli.main.commands) == COMMANDS
    text = succeed("--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example(command):
    text = succeed(command, "-h").stdout
    assert f"\nExample:\n\n  dllava-export {command}" in text


def test_version():
    assert succeed("--version").stdout == f"dllava-export, version {__version__}\n"


# Commands.


def test_export_prints_what_was_written(checkpoint, tmp_path, traced_once):
    result = succeed("export", checkpoint, tmp_path / "out")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"Wrote {tmp_path}/out in ")
    assert lines[2].split(":")[1] == " 2 of 4 image tokens, generated text keep rate 0.5"
    assert notes(result) == ""
    assert read_manifest(tmp_path / "out").sparsity.policy == "predictor"


def test_export_passes_its_options_on(plain, tmp_path, traced_once):
    options = ["--policy", "random", "--sparse-layer", 1, "--image-keep-tokens", 3]
    options += ["--output-text-keep-rate", 0.7, "--precision", "fp16"]
    succeed("export", plain, tmp_path / "out", *options, "--num-decoder-layers", 2)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.sparsity == Sparsity("random", 1, 0.2, 3, 0.7)
    assert (str(manifest.precision), manifest.geometry.num_layers) == ("fp16", 2)


def test_export_makes_up_weights(tmp_path, traced_once):
    config = {**factory.ORIGINAL_CONFIG, "vision_config": factory.VISION_CONFIG}
    factory.write_json(tmp_path / "tiny.json", config)
    arguments = [tmp_path / "tiny.json", tmp_path / "out", "--random-weights"]
    succeed("export", *arguments, "--policy", "none")
    assert read_manifest(tmp_path / "out").sparsity.is_dense


def test_sparsify_prints_what_was_written(bundles, tmp_path):
    options = ["--policy", "uniform", "--image-keep-rate", 0.25]
    result = succeed("sparsify", bundles.path("gqa"), tmp_path / "out", *options)
    assert "sparsity  uniform, from layer 3 on: 16 of 64 image tokens" in result.stdout
    assert read_manifest(tmp_path / "out").sparsity.image_keep_rate == 0.25


def test_generated_tokens_may_have_a_policy_of_their_own(bundles, tmp_path):
    options = ["--policy", "norm", "--output-text-policy", "uniform"]
    rate = ["--output-text-keep-rate", 0.4]
    result = succeed("sparsify", bundles.path("gqa"), tmp_path / "out", *options, *rate)
    assert "sparsity  norm (generated tokens: uniform), from layer 3 on" in result.stdout
    sparsity = read_manifest(tmp_path / "out").sparsity
    assert (sparsity.policy, sparsity.text_policy) == ("norm", "uniform")
    assert sparsity.output_text_keep_rate == 0.4


@pytest.mark.parametrize("mode", ["cache", "recompute"])
def test_run_prints_token_ids_without_a_tokenizer(bundles, mode):
    result = succeed("run", bundles.path("gqa"), *WITH_IMAGE, *SHORT, "--mode", mode)
    assert len([int(token) for token in result.stdout.split()]) <= 3
    assert "prompt 67 tokens, 18 of 64 image tokens kept" in result.stderr


def test_run_prints_text(bundles):
    arguments = [bundles.path("mha"), "--image", CAT, "--prompt", "w5 w6", *SHORT]
    result = succeed("run", *arguments)
    assert result.stdout.startswith("w")
    assert "7 of 36 image tokens kept" in result.stderr


def test_run_answers_without_an_image(bundles):
    arguments = [bundles.path("mha"), "--image", "none", "--prompt", "w5", *SHORT]
    assert "image tokens kept" not in succeed("run", *arguments).stderr


def test_run_prints_json(bundles):
    result = succeed("run", bundles.path("gqa"), *WITH_IMAGE, *SHORT, "--json")
    answer = json.loads(result.stdout)
    assert (answer["num_image_tokens"], answer["num_kept_image_tokens"]) == (64, 18)
    assert answer["finish_reason"] in ("stop", "length")
    assert notes(result) == ""


def test_run_repeats_a_seed(bundles):
    sampled = ["run", bundles.path("gqa"), *WITH_IMAGE, *SHORT, "--temperature", 2, "--json"]
    first, second, third = (
        json.loads(succeed(*sampled, "--seed", seed).stdout)["token_ids"] for seed in (1, 1, 2)
    )
    assert first == second != third


def test_inspect_prints_a_table(bundles):
    text = succeed("inspect", bundles.path("gqa"), "--prompt-len", 10).stdout
    assert "Sparsity  policy predictor; from layer 3 on 18 of 64 image tokens" in text
    assert "InsertKeepBitPass" in text


def test_inspect_prints_json(bundles):
    result = succeed("inspect", bundles.path("gqa"), "--json", "--output-len", 9)
    report = json.loads(result.stdout)
    assert (report["num_kept_image_tokens"], report["output_len"]) == (18, 9)


def test_inspect_plots(bundles, tmp_path):
    result = succeed("inspect", bundles.path("gqa"), "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert result.stdout.endswith(f"Drew {tmp_path}/plot.png\n")


def test_inspect_keeps_json_apart_from_messages(bundles, tmp_path):
    arguments = [bundles.path("gqa"), "--json", "--plot", tmp_path / "plot.svg"]
    result = succeed("inspect", *arguments)
    assert json.loads(result.stdout)["prompt_text_len"] == 64
    assert notes(result) == f"Drew {tmp_path}/plot.svg\n"


def test_inspect_knows_decoders_without_an_image(bundles, tmp_path):
    geometry = json.loads((bundles.path("gqa") / layout.MANIFEST).read_text())["geometry"]
    geometry["num_image_tokens"] = 0
    folder = changed(bundles.path("gqa"), tmp_path / "out", geometry=geometry)
    assert "0 of 0 image tokens" in succeed("inspect", folder).stdout


PLAN = ["--gpu-memory", "24GiB", "--max-input-len", 70, "--max-new-tokens", 30]


def test_plan_prints_a_table(bundles):
    text = succeed("plan", bundles.path("gqa"), *PLAN, "--batch-size", 2).stdout
    assert (
        "Request   70 prompt tokens, 64 of them of an image, and 30 new ones; batch 2" in text
    )
    assert "A batch of 2 fits in 24.00 GiB" in text


def test_plan_prints_json_and_plots(bundles, tmp_path):
    arguments = [bundles.path("gqa"), *PLAN, "--json", "--plot", tmp_path / "plan.svg"]
    result = succeed("plan", *arguments)
    assert json.loads(result.stdout)["request"]["gpu_memory"] == 24 * 2**30
    assert notes(result) == f"Drew {tmp_path}/plan.svg\n"
    assert (tmp_path / "plan.svg").read_bytes().startswith(b"<?xml")


def test_plan_refuses_a_size_without_a_unit(bundles):
    arguments = ["plan", bundles.path("gqa"), *PLAN, "--gpu-memory", "24"]
    assert_fails(2, "'24' is no size; expected a number above 0", arguments=arguments)


def test_every_command_says_what_it_took(bundles):
    result = succeed("inspect", bundles.path("gqa"), "--profile")
    *table, last = result.stderr.splitlines()
    assert table[0].split() == "stage time RSS at end peak RSS so far written".split()
    assert [line.split("  ")[0] for line in table[1:]] == [
        "checking the bundle",
        "other",
        "in all",
    ]
    assert last.startswith("inspect took ")


def test_quiet_does_not_say_what_a_command_took(bundles):
    assert succeed("-q", "inspect", bundles.path("gqa")).stderr == ""


@pytest.fixture
def benched(monkeypatch):
    """Stand in for the measurement; what it was asked for."""
    asked: dict[str, object] = {}

    def run_bench(folder: Path, settings: BenchSettings, *, progress: bool) -> BenchReport:
        asked.update(folder=folder, settings=settings, progress=progress)
        numbers = dict.fromkeys(settings.decode_lengths, 1)
        subject = Measurement("sparse", 1.0, numbers, numbers, 1, 1)
        return BenchReport(settings, [subject], 1.0, "a machine", [])

    monkeypatch.setattr(bench_module, "run_bench", run_bench)
    return asked


def test_bench_prints_a_table(benched, tmp_path):
    options = ["--decode-lengths", "5,0", "--threads", 1, "--rounds", 3, "--batch-size", 2]
    result = succeed("bench", tmp_path, *options, "--prompt-len", 9)
    assert benched["settings"] == BenchSettings(9, (0, 5), 2, 1, 3)
    assert result.stdout.startswith("a machine; 1 threads, batch 2")


def test_bench_writes_json(benched, tmp_path):
    result = succeed("bench", tmp_path, "--json", tmp_path / "numbers.json")
    assert json.loads((tmp_path / "numbers.json").read_text())["machine"] == "a machine"
    assert result.stdout.endswith(f"Wrote {tmp_path}/numbers.json\n")


def test_doctor_prints_versions():
    assert "onnxruntime" in succeed("doctor").stdout


def test_doctor_prints_json():
    assert json.loads(succeed("doctor", "--json").stdout)["packages"]["numpy"]


def test_verbose_logs_to_stderr(bundles, tmp_path, caplog):
    result = succeed("-v", "sparsify", bundles.path("gqa"), tmp_path / "out")
    assert "InsertImageSelectionPass" in caplog.text
    assert "InsertImageSelectionPass" not in result.stdout


# Wrong checkpoints and output folders.


def test_a_location_that_is_no_checkpoint(tmp_path):
    arguments = ["export", tmp_path / "nothing", tmp_path / "out"]
    assert_fails(1, "neither a folder nor a hub id", "Check the path.", arguments=arguments)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    arguments = ["export", tmp_path, tmp_path / "out"]
    assert_fails(1, "config.json", "a checkpoint", arguments=arguments)


def test_a_checkpoint_of_another_kind(tmp_path):
    factory.write_json(tmp_path / "config.json", {"model_type": "bert"})
    assert_fails(1, "bert", "expected", arguments=["export", tmp_path, tmp_path / "out"])


def test_truncated_weights(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    arguments = ["export", checkpoint, tmp_path / "out"]
    assert_fails(1, "model.safetensors", "bytes", arguments=arguments)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_files_in_it(checkpoint, tmp_path):
    arguments = ["export", checkpoint, tmp_path]
    assert_fails(1, "is a folder with files in it", "Choose another", arguments=arguments)


def test_an_output_folder_below_a_file(checkpoint, tmp_path):
    (tmp_path / "file").write_text("mine")
    arguments = ["export", checkpoint, tmp_path / "file" / "out"]
    assert_fails(1, "cannot be written", "Choose a folder", arguments=arguments)


def test_an_output_folder_that_cannot_be_written(checkpoint, tmp_path, monkeypatch):
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    arguments = ["export", checkpoint, tmp_path / "out"]
    assert_fails(1, "cannot be written (Permission denied)", arguments=arguments)


def test_a_disk_that_fills_up_with_weights(checkpoint, tmp_path, monkeypatch, traced_once):
    full_disk.fill_up(monkeypatch)
    arguments = ["export", checkpoint, tmp_path / "out", "--precision", "fp16"]
    assert_fails(1, "No space left on device", "Free some", arguments=arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_fills_up_at_the_end(bundles, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sparsifier, "write_manifest", full)
    arguments = ["sparsify", bundles.path("gqa"), tmp_path / "out"]
    parts = ["No space left on device", "Free some space", "nothing was left behind"]
    assert_fails(1, *parts, arguments=arguments)
    assert list(tmp_path.iterdir()) == []


# Wrong settings.


@pytest.mark.parametrize("command", ["export", "sparsify"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--image-keep-rate", "0"], "0<x<=1", id="rate 0"),
        pytest.param(["--image-keep-rate", "-0.1"], "0<x<=1", id="rate below 0"),
        pytest.param(["--image-keep-rate", "1.1"], "0<x<=1", id="rate above 1"),
        pytest.param(["--output-text-keep-rate", "2"], "0<x<=1", id="text rate above 1"),
        pytest.param(["--image-keep-tokens", "0"], "x>=1", id="no tokens"),
        pytest.param(["--sparse-layer", "0"], "x>=1", id="layer 0"),
        pytest.param(["--policy", "best"], "policy must be one of attention, dart, ",
                     id="unknown policy"),
        pytest.param(["--output-text-policy", "norm"],
                     "policy 'norm' has no decision for a single token", id="no text policy"),
        pytest.param(["--image-keep-rate", "0.5", "--image-keep-tokens", "3"],
                     "Give --image-keep-rate or --image-keep-tokens, not both.", id="both"),
    ],
)  # fmt: skip
def test_wrong_usage_of_sparsity_options(tmp_path, command, options, message):
    assert_fails(2, message, arguments=[command, tmp_path, tmp_path / "out", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--sparse-layer", "3"],
                     "sparse_layer must be in 1..2 for 3 decoder layers, got 3.", id="layer"),
        pytest.param(["--image-keep-rate", "0.1"], "0 of 4 image tokens would be kept",
                     id="nothing kept"),
        pytest.param(["--image-keep-tokens", "5"], "5 of 4 image tokens would be kept",
                     id="more than there are"),
        pytest.param(["--policy", "norm", "--output-text-keep-rate", "0.5"],
                     "Use output_text_keep_rate 1.0, or an output_text_policy: predictor, ",
                     id="norm"),
        pytest.param(["--image-keep-rate", "nan"],
                     "image_keep_rate must be a finite number, got nan.", id="not a number"),
        pytest.param(["--num-decoder-layers", "9"], "num_decoder_layers", id="too many layers"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_checkpoint(checkpoint, tmp_path, options, message):
    assert_fails(1, message, arguments=["export", checkpoint, tmp_path / "out", *options])
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_the_bundle(bundles, tmp_path):
    arguments = ["sparsify", bundles.path("gqa"), tmp_path / "out", "--sparse-layer", "5"]
    assert_fails(1, "sparse_layer must be in 1..4", arguments=arguments)


def test_plain_llava_has_no_predictors(plain, tmp_path):
    arguments = ["export", plain, tmp_path / "out", "--policy", "predictor"]
    parts = ["without an image predictor", "--policy attention, dart, ", ", uniform, or none"]
    assert_fails(1, *parts, arguments=arguments)


# Wrong requests.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--input-ids", "1,5"], "The bundle takes an image with its prompt, and "
                     "none was given. Pass --image FILE", id="no word about the image"),
        pytest.param(["--input-ids", "1,5", "--image", CAT], "Prompt 0 has no image placeholder "
                     "(-200), but an image was given", id="image without placeholder"),
        pytest.param(["--input-ids", "1,-200", "--image", "none"], "Prompt 0 has an image "
                     "placeholder (-200), but no image was given", id="placeholder only"),
        pytest.param(["--input-ids", "1,-200,-200,5", "--image", CAT],
                     "the prompt has 2 image placeholders, at [1, 2]; expected 1",
                     id="two placeholders"),
        pytest.param(["--input-ids", "1,-200,999", "--image", CAT],
                     "token id 999 at position 2 is not in the vocabulary; expected 0 to 130",
                     id="outside the vocabulary"),
        pytest.param(["--input-ids", "", "--image", "none"], "expected at least one token id",
                     id="empty"),
        pytest.param(["--input-ids", ",".join(["5"] * 513), "--image", "none"],
                     "The prompt has 513 tokens", id="too long"),
        pytest.param(["--input-ids", ",".join(["-200"] + ["5"] * 449), "--image", CAT],
                     "The prompt has 513 tokens (64 of them image tokens), the session has room "
                     "for 512", id="too long with its image"),
        pytest.param(["--prompt", "Hello", "--image", CAT], "has no tokenizer, so it takes token "
                     "ids instead of text. Use --input-ids", id="text without tokenizer"),
        pytest.param(["--input-ids", "5", "--image", "no.png"], "no.png does not exist",
                     id="missing image"),
        pytest.param([*WITH_IMAGE, "--backend", "tensorrt-rtx", "--provider", "cpu"],
                     "provider 'cpu' was given with backend 'tensorrt-rtx', which has none",
                     id="provider of another backend"),
    ],
)  # fmt: skip
def test_requests_that_do_not_fit_the_bundle(bundles, options, message):
    if "no.png" in options:
        options = ["--input-ids", "1,-200", *options[2:]]
    assert_fails(1, message, arguments=["run", bundles.path("gqa"), *options])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "picture.png has 0 bytes; expected an image", id="empty"),
        pytest.param(b"no picture", "(10 bytes) cannot be decoded", id="text"),
        pytest.param(Path(CAT).read_bytes()[:1000], "(1000 bytes) cannot be decoded",
                     id="truncated"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_read(bundles, tmp_path, content, message):
    (tmp_path / "picture.png").write_bytes(content)
    arguments = ["--input-ids", "1,-200", "--image", tmp_path / "picture.png"]
    assert_fails(1, message, arguments=["run", bundles.path("gqa"), *arguments])


def test_an_image_for_a_bundle_that_takes_none(bundles, tmp_path):
    folder = changed(bundles.path("gqa"), tmp_path / "out", has_visual=False)
    message = "has no vision tower and takes no images."
    assert_fails(1, message, arguments=["run", folder, *WITH_IMAGE])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="neither"),
        pytest.param(["--prompt", "a", "--input-ids", "5"], id="both"),
    ],
)
def test_prompt_or_ids(tmp_path, options):
    message = "Give either --prompt or --input-ids, one of the two."
    assert_fails(2, message, arguments=["run", tmp_path, *options])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["run", "out", "--input-ids", "1,a"], "expected numbers like 1,-200,15,27; "
                     "got '1,a'", id="ids"),
        pytest.param(["run", "out", "--mode", "fast"], "'fast' is not one of", id="mode"),
        pytest.param(["run", "out", "--top-p", "0"], "0<x<=1", id="top-p"),
        pytest.param(["bench", "out", "--decode-lengths", "1,b"],
                     "--decode-lengths expects numbers like 0,256; got '1,b'.", id="lengths"),
        pytest.param(["bench", "out", "--json", "no/such.json"], "folder 'no' does not exist.",
                     id="numbers nowhere"),
        pytest.param(["inspect", "out", "--plot", "no/such.png"],
                     "folder 'no' does not exist.", id="plot nowhere"),
        pytest.param(["sparsify", "nothing", "out"], "'nothing' does not exist", id="dense"),
        pytest.param(["transform"], "No such command 'transform'", id="command"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments, message):
    assert_fails(2, message, arguments=arguments)


@pytest.mark.parametrize("command", ["run", "inspect", "bench"])
def test_a_folder_that_is_no_bundle(tmp_path, command):
    options = ["--input-ids", "5"] if command == "run" else []
    message = f"{tmp_path} has no dllava_export.json; expected a bundle."
    assert_fails(1, message, arguments=[command, tmp_path, *options])


def test_a_plot_of_another_format(bundles, tmp_path):
    path = tmp_path / "plot.txt"
    result = invoke("inspect", bundles.path("gqa"), "--plot", path)
    assert result.exit_code == 1
    assert "has suffix '.txt', expected one of .png, .svg, .pdf" in result.stderr


def test_errors_of_other_packages_keep_their_traceback(bundles, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *_, **__: int("x"))
    result = invoke("inspect", bundles.path("gqa"), "--json")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "inspect failed where it should work or say why not: ValueError:" in result.stderr
