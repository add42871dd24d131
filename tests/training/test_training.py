from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_factory import TEXT_CONFIG, make_checkpoint
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file
from training_factory import (
    PREDICTOR_SIZES,
    assert_session_equals_training,
    dynamic_llava,
    mixed_records,
    one_thread,
    plain_llava,
    read_data,
    record,
    write_data,
)
from word_tokenizer import save_tokenizer

import dllava_export
from dllava_export.checkpoints.checkpoint import random_checkpoint, read_checkpoint
from dllava_export.cli import main
from dllava_export.errors import BundleError
from dllava_export.exporting.exporter import export_checkpoint
from dllava_export.precision import FP32
from dllava_export.training import loop
from dllava_export.training.data import Batch
from dllava_export.training.loop import train_predictors
from dllava_export.training.model import build_model
from dllava_export.training.settings import (
    BadRecordError,
    TrainingError,
    TrainingSettings,
    resolve_predictors,
)

pytestmark = pytest.mark.slow

__all__ = ["one_thread"]

FAST = {"model_lr": 2e-3, "predictor_lr": 1e-3, "batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def data(folder):
    return write_data(folder / "data", mixed_records())


@pytest.fixture(scope="module")
def trained(folder, data):
    """A plain LLaVA after 12 steps, its reports, and the report of the run."""
    settings = TrainingSettings(steps=12, **FAST, **PREDICTOR_SIZES)
    steps = []
    report = train_predictors(
        plain_llava(folder), data, folder / "trained", settings, on_step=steps.append
    )
    return report, steps


def train(folder, out, data, *, checkpoint=None, resume=False, on_step=None, **changes):
    settings = TrainingSettings(**{"steps": 5, **FAST, **PREDICTOR_SIZES, **changes})
    return train_predictors(
        checkpoint or plain_llava(folder), data, out, settings, resume=resume, on_step=on_step
    )


def weights(out):
    return load_file(out / "model.safetensors")


def logged(out):
    lines = (out / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_loss_falls(trained):
    _, steps = trained
    assert steps[-1].ce_loss < steps[0].ce_loss - 0.5
    assert steps[-1].loss < steps[0].loss


def test_the_log_has_a_line_per_step(trained):
    report, steps = trained
    assert logged(report.folder) == [vars(step) for step in steps]
    assert [step.step for step in steps] == list(range(1, 13))
    assert steps[0].predictor_lr == 0  # the first step of the warmup
    assert steps[1].predictor_lr == pytest.approx(1e-3)
    assert steps[-1].predictor_lr < 1e-4
    assert steps[0].tau == 1
    assert steps[-1].tau == pytest.approx(0.1 ** (11 / 12))


def test_the_checkpoint_has_the_official_layout(folder, trained):
    report, _ = trained
    config = json.loads((report.folder / "config.json").read_text())
    assert config["architectures"] == ["DynamicLlavaLlamaForCausalLM"]
    assert config["sparse_config"]["output_text_len_for_training"] == 50
    official = load_file(dynamic_llava(folder) / "model.safetensors")
    found = weights(report.folder)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in official.items()}
    checkpoint = read_checkpoint(report.folder)
    assert checkpoint.spec.layout == "dynamic-llava"
    assert checkpoint.has_tokenizer
    assert checkpoint.spec.predictors.sparse_layer == 2
    assert (report.folder / "preprocessor_config.json").is_file()
    assert not (report.folder / "training_state.pt").exists()


def test_the_tower_stays_as_it_was(folder, trained):
    before = load_file(plain_llava(folder) / "model.safetensors")
    after = weights(trained[0].folder)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "vision_tower" not in name}


def test_the_summary_says_what_was_written(trained):
    report, _ = trained
    text = report.to_text()
    assert text.startswith(f"Wrote {report.folder} in ")
    assert "12 steps on 5 records, 0 skipped" in text
    assert "of image tokens (target 20.0%)" in text
    assert "of answer tokens (target 50.0%)" in text
    assert "mean of the last 12 steps" in text


def test_the_losses_are_drawn(trained):
    with Image.open(trained[0].folder / "training_log.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_a_trained_checkpoint_exports_and_runs_as_in_training(folder, data, trained):
    path = trained[0].folder
    checkpoint = read_checkpoint(path)
    export_checkpoint(checkpoint, folder / "bundle")
    settings = TrainingSettings()
    predictors = resolve_predictors(settings, checkpoint)
    model = build_model(checkpoint, predictors, settings, torch.device("cpu")).eval()
    records = read_data(path, data)
    batch = Batch.from_samples([records.sample(entry) for entry in records.records[:2]])
    session = dllava_export.load(folder / "bundle", num_threads=1)
    assert_session_equals_training(session, model, batch)
    (answer,) = session.generate(["w5 w6"], [data.parent / "0.png"], max_new_tokens=3)
    assert len(answer.token_ids) >= 1


class InterruptError(Exception):
    pass


def stop_at(step):
    def stop(report):
        if report.step == step:
            raise InterruptError

    return stop


@pytest.mark.parametrize(
    "step", [pytest.param(4, id="at a state"), pytest.param(5, id="behind")]
)
def test_a_resumed_run_is_the_same_to_the_bit(folder, data, tmp_path, step):
    settings = {"steps": 7, "checkpoint_every": 2}
    whole = train(folder, tmp_path / "whole", data, **settings)
    with pytest.raises(InterruptError):
        train(folder, tmp_path / "parts", data, on_step=stop_at(step), **settings)
    parts = train(folder, tmp_path / "parts", data, resume=True, **settings)
    assert parts.num_resumed == 4
    assert_same_weights(whole.folder, parts.folder)
    logs = [logged(run.folder) for run in (whole, parts)]
    for log in logs:
        for entry in log:
            del entry["seconds"]
    assert logs[0] == logs[1]


def test_a_run_without_a_state_resumes_from_the_start(folder, data, tmp_path):
    with pytest.raises(InterruptError):
        train(folder, tmp_path / "out", data, on_step=stop_at(1), steps=2)
    report = train(folder, tmp_path / "out", data, resume=True, steps=2)
    assert report.num_resumed == 0
    assert len(logged(report.folder)) == 2


def test_the_seed_decides(folder, data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(folder, tmp_path / name, data, steps=2, seed=seed)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    name = "model.image_score_predictor.down_mlp.1.weight"
    a, c = (weights(tmp_path / run)[name] for run in "ac")
    assert not np.array_equal(a, c)


def test_another_run_cannot_be_resumed(folder, data, tmp_path):
    with pytest.raises(InterruptError):
        train(folder, tmp_path / "out", data, on_step=stop_at(2), checkpoint_every=1)
    with pytest.raises(TrainingError, match="holds another run: seed was 0, is 3; tau_end"):
        train(folder, tmp_path / "out", data, resume=True, seed=3, tau_end=0.2)
    with pytest.raises(TrainingError, match="Go on with --resume, choose another name"):
        train(folder, tmp_path / "out", data)
    (tmp_path / "out" / "training_state.pt").write_bytes(b"half a file")
    with pytest.raises(TrainingError, match=r"cannot be read .* Remove .* and start anew"):
        train(folder, tmp_path / "out", data, resume=True)


def test_a_finished_run_cannot_be_resumed(folder, data, trained):
    with pytest.raises(TrainingError, match="finished checkpoint, there is nothing to resume"):
        train(folder, trained[0].folder, data, resume=True)


def test_a_folder_with_files_is_refused(folder, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        TrainingError, match="folder with files in it; expected a new or empty"
    ):
        train(folder, tmp_path, data)
    with pytest.raises(TrainingError, match="is a file; expected a folder"):
        train(folder, tmp_path / "notes.txt", data)


def test_predictors_alone_leave_the_model_as_it_was(folder, data, tmp_path):
    report = train(folder, tmp_path / "out", data, steps=2, freeze_model=True)
    before, after = (
        load_file(plain_llava(folder) / "model.safetensors"),
        weights(report.folder),
    )
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == {
        "image_score_predictor",
        "output_text_score_predictor",
    }


def test_predictors_of_a_checkpoint_keep_their_settings(folder, data, tmp_path):
    checkpoint = dynamic_llava(folder)
    report = train(folder, tmp_path / "out", data, checkpoint=checkpoint, steps=1)
    assert read_checkpoint(report.folder).spec.predictors == (
        read_checkpoint(checkpoint).spec.predictors
    )


def test_an_image_predictor_alone(folder, data, tmp_path):
    report = train(folder, tmp_path / "out", data, steps=1, use_output_text_predictor=False)
    assert report.final.text_keep_rate is None
    assert not read_checkpoint(report.folder).spec.predictors.has_output_text
    assert "answer tokens" not in report.to_text()


def test_a_plain_llava_is_trained_from_random_weights(folder, data, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(plain_llava(folder), start)
    (start / "model.safetensors").unlink()
    tower = json.loads((start / "vision_tower" / "config.json").read_text())
    config = json.loads((start / "config.json").read_text()) | {"vision_config": tower}
    (start / "config.json").write_text(json.dumps(config))
    records = [*mixed_records(3), record(None, "w7 w8", question="w5")]
    report = train_predictors(
        random_checkpoint(start / "config.json"),
        write_data(tmp_path / "data", records),
        tmp_path / "out",
        TrainingSettings(epochs=2.5, train_predictors=False, freeze_tower=False, **FAST),
    )
    assert report.num_steps == math.ceil(2.5 * 4 / 2)
    assert report.final.image_keep_rate is None
    assert "kept" not in report.to_text()
    checkpoint = read_checkpoint(report.folder)
    assert (checkpoint.spec.layout, checkpoint.has_predictors) == ("llava", False)
    assert checkpoint.spec.image_aspect_ratio == "pad"


def test_a_llava_hf_checkpoint_becomes_an_official_one(tmp_path):
    text = {**TEXT_CONFIG, "max_position_embeddings": 128, "rope_theta": 5000.0}
    make_checkpoint(tmp_path / "hf", "llava-hf", changes={"text_config": text})
    save_tokenizer(tmp_path / "hf")
    data = write_data(tmp_path / "data", [record("0.png", "w7 w8", "w9")])
    sizes = {"image_keep_rate": 0.5, "d_model": 8, "nhead": 2}
    settings = TrainingSettings(steps=1, batch_size=1, freeze_model=True, **sizes)
    report = train_predictors(tmp_path / "hf", data, tmp_path / "out", settings)
    before, after = read_checkpoint(tmp_path / "hf"), read_checkpoint(report.folder)
    assert after.spec.layout == "dynamic-llava"
    assert after.spec.text_config.to_dict() == before.spec.text_config.to_dict()
    assert after.spec.vision_config.to_dict() == before.spec.vision_config.to_dict()
    assert after.config["rope_theta"] == 5000
    for name, source in before.tensors.items():
        assert np.array_equal(after.tensors[name].read(), source.read())


@pytest.mark.parametrize("changes", [{}, {"freeze_model": True}], ids=["all", "predictors"])
def test_mixed_precision_trains(folder, data, tmp_path, changes):
    report = train(
        folder, tmp_path / "out", data, steps=2, compute_precision="bf16", **changes
    )
    assert math.isfinite(report.final.loss)
    assert read_checkpoint(report.folder).weight_format == FP32


def test_a_run_whose_result_could_not_be_written_resumes_with_its_last_step(
    folder, data, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise BundleError("no space left")

    with monkeypatch.context() as patch, pytest.raises(BundleError):
        patch.setattr(loop, "write_checkpoint", fail)
        train(folder, tmp_path / "out", data, steps=2)
    report = train(folder, tmp_path / "out", data, steps=2, resume=True)
    assert (report.num_resumed, report.num_steps) == (2, 2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_precision_of_the_weights_can_be_chosen(folder, data, tmp_path, precision):
    report = train(folder, tmp_path / "out", data, steps=1, precision=precision)
    assert read_checkpoint(report.folder).weight_format.name == precision


def test_accumulated_batches_make_one_step(folder, data, tmp_path):
    steps = []
    train(folder, tmp_path / "out", data, steps=1, accumulation_steps=3, on_step=steps.append)
    assert len(steps) == 1


def test_a_loss_that_is_no_number_stops_with_the_records(folder, data, tmp_path):
    with pytest.raises(
        TrainingError, match=r"The loss of step \d is nan.* chats.json, record"
    ):
        train(
            folder, tmp_path / "out", data, model_lr=1e30, max_grad_norm=1e30, warmup_ratio=0.0
        )


def test_bad_records_stop_or_are_counted(folder, tmp_path):
    records = [*mixed_records(3), record("nothing.png")]
    path = write_data(tmp_path / "data", records)
    with pytest.raises(BadRecordError, match=r"chats.json, record 3 .*nothing.png does not"):
        train(folder, tmp_path / "out", path, steps=1)
    report = train_predictors(
        plain_llava(folder),
        path,
        tmp_path / "out",
        TrainingSettings(steps=1, **FAST, **PREDICTOR_SIZES),
        on_bad_record="skip",
    )
    assert "on 3 records, 1 skipped" in report.to_text()
    assert "skipped: chats.json, record 3" in report.to_text()


def test_a_checkpoint_needs_a_tokenizer(folder, data, tmp_path):
    path = tmp_path / "bare"
    shutil.copytree(plain_llava(folder), path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(TrainingError, match=r"has no tokenizer, expected tokenizer\.json"):
        train(folder, tmp_path / "out", data, checkpoint=path)


def test_an_unknown_device_is_refused(folder, data, tmp_path):
    with pytest.raises(ValueError, match="device 'abacus' cannot be used"):
        train(folder, tmp_path / "out", data, device="abacus")


def test_command_trains_and_prints_a_summary(folder, data, tmp_path):
    arguments = [
        "train-predictors",
        str(dynamic_llava(folder)),
        str(data),
        str(tmp_path / "out"),
    ]
    options = ["--steps", "2", "--batch-size", "2", "--freeze-model", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Wrote {tmp_path / 'out'} in ")
    assert "2 steps on 5 records" in result.stdout


def test_command_explains_what_is_wrong(folder, tmp_path):
    path = write_data(tmp_path / "data", [record("nothing.png")])
    arguments = [
        "train-predictors",
        str(dynamic_llava(folder)),
        str(path),
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "chats.json, record 0 (id 'a'): the image" in result.stderr
    assert "Traceback" not in result.stderr


def test_command_has_the_defaults_of_the_settings(folder, data, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        loop,
        "train_predictors",
        lambda checkpoint, data, out, settings, **_: found.append(settings),
    )
    CliRunner().invoke(main, ["train-predictors", "checkpoint", str(data), "out"])
    assert found == [TrainingSettings()]


def test_command_line_does_not_load_torch_for_its_help():
    code = "import sys, dllava_export.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
