from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from places import ROOT

from dllava_export.backends.trt.build.build_engines import build_engines
from dllava_export.backends.trt.build.build_options import BuildOptions
from dllava_export.backends.trt.engine_config import read_engine_config
from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.evaluation.evaluate import evaluate_bundles
from dllava_export.evaluation.settings import EvaluationSettings
from dllava_export.exporting.exporter import export_checkpoint
from dllava_export.prompts.images import ImageProcessor
from dllava_export.prompts.tokenizer import ChatTokenizer
from dllava_export.training.data import Batch, ConversationData
from dllava_export.training.model import TrainingModel, build_model
from dllava_export.training.settings import TrainingSettings

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra `examples`)")

FOLDER = ROOT / "examples" / "digit_mosaic"
SEED = 4
KINDS = ["count", "list", "place", "largest", "sum", "describe"]


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return _module("mosaic_data")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return _module("train")


@pytest.fixture(scope="module")
def stages() -> ModuleType:
    return _module("stages")


@pytest.fixture(scope="module")
def packs() -> ModuleType:
    return _module("language_task")


def _module(name: str) -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    _module("mosaic_model").write_untrained(folder, SEED)
    return folder


@pytest.fixture
def model(untrained: Path) -> TrainingModel:
    settings = TrainingSettings(train_predictors=False)
    return build_model(read_checkpoint(untrained), None, settings, torch.device("cpu"))


def test_mosaic_repeats_with_its_seed(data: ModuleType) -> None:
    first, again, other = (
        data.make_mosaic(data.mosaic_rng(SEED, index), "test") for index in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.digits == again.digits
    assert not np.array_equal(first.pixels, other.pixels)


def test_splits_share_no_digit(data: ModuleType) -> None:
    train, test = (data._digits(split)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    flat = test.reshape(len(test), 1, -1)
    assert (np.abs(flat - train.reshape(1, len(train), -1)).max(-1) > 0).all()


def test_ink_is_where_digits_are(data: ModuleType) -> None:
    for index in range(20):
        mosaic = data.make_mosaic(data.mosaic_rng(SEED, index), "train")
        row, column = np.divmod(np.flatnonzero(mosaic.has_ink), data.PATCHES_PER_SIDE)
        assert set(row // 8 * 3 + column // 8) == set(mosaic.digits)
        assert mosaic.has_ink.sum() <= 9 * len(mosaic.digits)
        bright = mosaic.pixels.max(-1).reshape(24, 8, 24, 8).max((1, 3)).reshape(-1)
        assert (bright[mosaic.has_ink] > bright[~mosaic.has_ink].min()).all()


def test_answers(data: ModuleType) -> None:
    mosaic = data.Mosaic(np.zeros((1, 1, 3), np.uint8), {0: 7, 4: 3, 8: 7}, np.zeros(1, bool))
    answers = {q.kind: q.answer for q in data.all_questions(mosaic, 4)}
    assert list(answers) == KINDS
    assert answers["count"] == "3"
    assert answers["list"] == "7 3 7"
    assert answers["place"] == "3"
    assert answers["largest"] == "7"
    assert answers["sum"] == "7 + 3 = 10, 10 + 7 = 17"
    assert answers["describe"].startswith("The top left holds a 7. The top center is empty. ")
    assert answers["describe"].endswith("holds a 7. There are 3 digits in total.")
    assert data.place_question(mosaic, 1).answer == "none"


def test_tokenizer_knows_every_word(data: ModuleType, untrained: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(untrained, template="vicuna_v1", image_token_id=-200)
    for index in range(20):
        mosaic = data.make_mosaic(data.mosaic_rng(SEED, index), "test")
        for question in data.all_questions(mosaic, index % 9):
            turns = [(question.text, question.answer)]
            ids, is_answer = tokenizer.encode_answered(turns, image_turn=0)
            assert 0 not in ids
            assert tokenizer.decode(ids[is_answer]) == question.answer
            assert (is_answer.sum() > 50) == (question.kind == "describe")


def test_conversations_are_read_by_training(
    data: ModuleType, untrained: Path, tmp_path: Path
) -> None:
    path = data.write_conversations(tmp_path, "test", SEED, 2)
    assert [record["kind"] for record in json.loads(path.read_text())] == KINDS * 2
    records = _read_conversations(path, untrained)
    assert not records.skipped
    sample = records.sample(records.records[0])
    mosaic = data.make_mosaic(data.mosaic_rng(SEED, 0), "test")
    train = _module("train")
    pixels = train.Task(read_checkpoint(untrained)).pixels([mosaic])[0]
    assert sample.pixel_values is not None
    np.testing.assert_allclose(sample.pixel_values, pixels, atol=tolerances.SAME_MODEL)


def _read_conversations(path: Path, folder: Path) -> ConversationData:
    checkpoint = read_checkpoint(folder)
    return ConversationData.read(
        path,
        image_folder=None,
        needs_image=True,
        tokenizer=ChatTokenizer.from_folder(
            folder, template="vicuna_v1", image_token_id=checkpoint.spec.image_token_id
        ),
        image_processor=ImageProcessor.from_config(checkpoint.preprocessor, "pad"),
        num_image_tokens=checkpoint.spec.num_image_tokens,
        max_length=1024,
        vocab_size=checkpoint.spec.text_config.vocab_size,
    )


def test_packed_questions_equal_single_ones(
    data: ModuleType,
    train: ModuleType,
    packs: ModuleType,
    untrained: Path,
    model: TrainingModel,
    tmp_path: Path,
) -> None:
    path = data.write_conversations(tmp_path, "test", SEED, 1)
    records = _read_conversations(path, untrained)
    expected = []
    with torch.no_grad():
        for record in records.records:
            batch = Batch.from_samples([records.sample(record)])
            hidden = model.decode(model.embed(batch), None)
            expected.append(model.logits(hidden[:, :-1][batch.is_answer[:, 1:]]))

        mosaic = data.make_mosaic(rng := data.mosaic_rng(SEED, 0), "test")
        questions = data.all_questions(mosaic, data.asked_cell(rng, mosaic))
        task = train.Task(read_checkpoint(untrained))
        pack = packs.PackBatch.make(task, [mosaic], [questions], [np.arange(data.NUM_PATCHES)])
        model.language_model.config._attn_implementation = "sdpa"
        logits, ids = packs.answer_logits(model, pack)
    np.testing.assert_allclose(logits, torch.cat(expected), atol=tolerances.GOLDEN)
    assert (ids == 2).sum() == len(KINDS)


def _stages(train: ModuleType, **changes: Any) -> tuple[Any, ...]:
    small = {"steps": 4, "batch_size": 2, "num_patches": 64, **changes}
    return tuple(dataclasses.replace(stage, **small) for stage in train.STAGES[::2])


def test_training_goes_on_exactly_where_it_stopped(
    train: ModuleType,
    stages: ModuleType,
    packs: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "NUM_TEST_MOSAICS", 2)
    small = _stages(train)
    found = train.train(_new(tmp_path / "whole"), small)
    assert set(found) == set(KINDS)
    assert all(0 <= share <= 1 for share in found.values())

    monkeypatch.setattr(stages, "SAVE_EVERY", 0)
    draw = packs.PackBatch.draw

    def draw_or_stop(task: Any, split: str, seed: int, indices: range, *args: Any) -> Any:
        if indices.start == 4:
            raise KeyboardInterrupt
        return draw(task, split, seed, indices, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packs.PackBatch, "draw", draw_or_stop)
        train.train(_new(tmp_path / "parts"), small)
    train.train(tmp_path / "parts", small)

    whole, parts = (
        read_checkpoint(tmp_path / name / train.DENSE_FOLDER) for name in ("whole", "parts")
    )
    for name in whole.tensors:
        np.testing.assert_array_equal(
            parts.tensors[name].read(), whole.tensors[name].read(), err_msg=name
        )
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / name / stages.LOG_FILE).read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert (tmp_path / "whole" / stages.PLOT_FILE).stat().st_size > 1000
    assert len(logs[0]) == 8
    assert logs[0] == logs[1]


def test_predictors_are_trained_from_the_dense_checkpoint(
    train: ModuleType, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREDICTOR_SETTINGS", "TOGETHER_SETTINGS", "DECODER_SETTINGS"):
        short = dataclasses.replace(getattr(train, name), steps=1, batch_size=2)
        monkeypatch.setattr(train, name, short)
    folders = (train.PREDICTORS_FOLDER, train.TOGETHER_FOLDER, train.DECODER_FOLDER)
    monkeypatch.setattr(train, "NUM_CONVERSATIONS", dict.fromkeys(folders, 3))
    shutil.copytree(untrained, tmp_path / train.DENSE_FOLDER)
    train.train_sparse(tmp_path)
    checkpoint = read_checkpoint(tmp_path / train.SPARSE_FOLDER)
    assert checkpoint.spec.predictors is not None
    assert checkpoint.spec.predictors.vision_keep_rate == 0.2
    assert checkpoint.spec.predictors.output_text_keep_rate == 0.5
    num_bytes = sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors"))
    assert num_bytes < 12e6
    parts = [read_checkpoint(tmp_path / name).tensors for name in folders[1:]]
    for name, tensor in checkpoint.tensors.items():
        first, second = (part[name].read().astype(np.float32) for part in parts)
        np.testing.assert_array_equal(tensor.read(), ((first + second) / 2).astype(np.float16))


# The trained checkpoint.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "bundle"
    export_checkpoint(
        read_checkpoint(FOLDER / "checkpoints" / "sparse"), folder, precision="fp32"
    )
    return folder


def test_trained_checkpoints_are_small() -> None:
    files = (FOLDER / "checkpoints").rglob("*.safetensors")
    assert 0 < sum(path.stat().st_size for path in files) < 12e6


@pytest.mark.parametrize("mode", ["cache", "recompute"])
def test_trained_model_answers_about_unseen_digits(trained: Path, mode: str) -> None:
    settings = EvaluationSettings(mode=mode)
    report = evaluate_bundles([trained], FOLDER / "sample" / "questions.json", settings)
    (result,) = report.results
    assert [answer.text for answer in result.answers] == [
        answer.question.truth for answer in result.answers
    ]
    assert result.total.kept_image_tokens == 115
    kept = result.summaries["describe"].output_text_keep_rate
    assert kept is not None
    assert 0.3 < kept < 0.7


def test_trained_model_keeps_patches_with_ink(trained: Path) -> None:
    measure = _module("measure")
    share = measure.digit_patches_kept(FOLDER / "sample" / "questions.json", trained)
    assert share >= 0.95


def test_trained_model_builds_as_engines(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines are built with TensorRT-RTX")
    folder = tmp_path / "bundle"
    export_checkpoint(
        read_checkpoint(FOLDER / "checkpoints" / "sparse"), folder, precision="fp16"
    )
    options = BuildOptions(backend="tensorrt-rtx", max_input_len=640)
    build_engines(folder, options)
    config = read_engine_config(folder, "tensorrt-rtx")
    assert set(config.engines) == {"decoder", "visual", "recompute"}
    assert set(config.engines["decoder"].profiles) == {"prefill", "decode"}


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("part", [0, 1], ids=["tower", "language"])
def test_loss_falls(
    part: int,
    train: ModuleType,
    stages: ModuleType,
    untrained: Path,
    model: TrainingModel,
    tmp_path: Path,
) -> None:
    task = train.Task(read_checkpoint(untrained))
    stage = _stages(train, steps=40, weights=(1.0, 1.0, 1.0))[part]
    module = (train.TowerTask, train.LanguageTask)[part](model, task)
    stages.run_stage(tmp_path, stage, module)
    lines = (tmp_path / stages.LOG_FILE).read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
