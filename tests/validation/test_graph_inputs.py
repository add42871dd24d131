from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import tolerances
from golden import DATA
from polygraphy.json import load_json

from dllava_export import names
from dllava_export.backends.ort.backend import open_session
from dllava_export.bundles.manifest import read_manifest, write_manifest
from dllava_export.errors import BackendError, BundleError, InvalidInputError
from dllava_export.precision import Precision
from dllava_export.validation.conversation import conversation_for
from dllava_export.validation.graph_inputs import save_graph_inputs
from dllava_export.validation.settings import ValidationSettings

SETTINGS = ValidationSettings(num_steps=4, num_threads=1)
NUM_PROMPT, NUM_KEPT = 60, 31  # of checkpoint mha: 24 text rows, 7 of 36 image rows
FILES = ["visual", "decoder_prefill", "decoder_decode", "recompute", "dense"]


def save(bundle, folder, settings=SETTINGS, **prompt):
    """Return what was saved, and file stem → inputs."""
    saved = save_graph_inputs(bundle, folder, settings, **prompt)
    return saved, {each.file.stem: feed_of(each) for each in saved.files}


def feed_of(inputs):
    (feed,) = load_json(str(inputs.file))
    return feed


def logits_of(bundle, graph, feed):
    session = open_session(bundle / graph, num_threads=1)
    found = session.run(None, feed)
    return dict(zip((out.name for out in session.get_outputs()), found, strict=True))["logits"]


@pytest.fixture(scope="module")
def mha(bundles, tmp_path_factory):
    path = bundles.path("mha")
    return path, *save(path, tmp_path_factory.mktemp("inputs") / "mha")


@pytest.mark.parametrize(
    ("checkpoint", "precision", "sparsity"),
    [
        ("mha", "fp32", {}),
        ("mha", "fp16", {}),
        ("gqa", "fp32", {}),
        ("mha", "fp32", {"policy": "none"}),
    ],
    ids=["predictor", "fp16", "shared key heads", "dense"],
)
def test_names_types_and_shapes_are_the_graphs(
    bundles, tmp_path, checkpoint, precision, sparsity
):
    path = bundles.path(checkpoint, precision, **sparsity)
    saved, feeds = save(path, tmp_path / "inputs")
    assert list(feeds) == FILES
    assert sorted(each.name for each in (tmp_path / "inputs").iterdir()) == sorted(
        f"{name}.json" for name in FILES
    )
    tensors = read_manifest(path, verify=False).tensors
    for each in saved.files:
        feed = feeds[each.file.stem]
        entries = tensors[each.graph]["inputs"]
        assert {entry["name"]: entry["dtype"] for entry in entries} == {
            name: array.dtype.name for name, array in feed.items()
        }
        for entry in entries:
            shape = feed[entry["name"]].shape
            assert len(shape) == len(entry["shape"])
            pairs = zip(shape, entry["shape"], strict=True)
            assert all(size == want for size, want in pairs if isinstance(want, int))
        assert each.num_bytes == each.file.stat().st_size


def test_caches_are_as_large_as_the_request(mha):
    _, _, feeds = mha
    for feed in (feeds["decoder_prefill"], feeds["decoder_decode"]):
        assert feed[names.past(0, "key")].shape[2] == NUM_PROMPT + 4 + 1
        assert feed[names.past(3, "key")].shape[2] == NUM_KEPT + 4 + 1


def test_the_graphs_compute_what_a_session_does(bundles, mha):
    path, _, feeds = mha
    session = bundles.session("mha")
    talk = conversation_for(path, session.manifest, SETTINGS, image=None, prompt=None)
    ids, features = [talk.input_ids], session.encode_images(talk.pixel_values)
    prefilled = session.prefill(ids, image_features=features, max_new_tokens=4)
    answered = [session.decode([int(token)]) for token in talk.output_ids]
    whole = session.recompute(ids, image_features=features, output_ids=talk.output_ids[None])
    for name, graph, expected in (
        ("decoder_prefill", "llm/model.onnx", prefilled),
        ("decoder_decode", "llm/model.onnx", answered[-1]),
        ("recompute", "llm/recompute.onnx", whole),
    ):
        found = logits_of(path, graph, feeds[name])
        np.testing.assert_allclose(found, expected.logits, atol=tolerances.SAME_MODEL)
    assert (
        feeds["decoder_decode"][names.write_index(names.SPARSE)]
        == answered[-2].cache_lengths[3]
    )
    assert logits_of(path, "llm/dense.onnx", feeds["dense"]).shape[:2] == (1, NUM_PROMPT + 4)


def test_what_was_written_is_listed_with_a_command_for_each(mha):
    path, saved, _ = mha
    lines = saved.to_text().splitlines()
    assert lines[0] == "Wrote inputs of every graph (random values, seed 0):"
    assert "llm/model.onnx, prefill of 60 rows" in lines[2]
    assert lines[7].startswith(f"  polygraphy run {path}/visual/model.onnx --onnxrt --dllava-")
    assert lines[9].endswith("decoder_decode.json --atol 0.0002 --rtol 0.0001")
    assert lines[11].endswith(f"llm/dense.onnx --onnxrt --load-inputs {saved.files[4].file}")


def test_the_same_seed_gives_the_same_files(mha, tmp_path):
    path, saved, _ = mha
    again, _ = save(path, tmp_path / "again")
    other, _ = save(path, tmp_path / "other", dataclasses.replace(SETTINGS, seed=1))
    for a, b, c in zip(saved.files, again.files, other.files, strict=True):
        assert a.file.read_bytes() == b.file.read_bytes() != c.file.read_bytes()


def test_a_text_prompt_feeds_no_image(bundles, tmp_path):
    _, feeds = save(bundles.path("mha"), tmp_path / "inputs", image="none", prompt="w5 w6")
    assert list(feeds) == FILES[1:]
    assert (feeds["decoder_prefill"][names.NUM_IMAGE_ROWS] == 0).all()


def test_a_picture_and_a_prompt_are_fed(bundles, tmp_path):
    cat = str(DATA.parents[1] / "examples" / "cat.png")
    saved, feeds = save(bundles.path("mha"), tmp_path / "inputs", image=cat, prompt="w5 w6")
    assert list(feeds) == FILES
    assert saved.origin == f"{cat}, 'w5 w6', greedy answer"


def copied(bundle, out, **changes):
    """Copy a bundle and change its manifest."""
    shutil.copytree(bundle, out, copy_function=shutil.copyfile)
    write_manifest(out, dataclasses.replace(read_manifest(out), **changes))
    return out


def test_a_dense_decoder_that_takes_something_else_is_left_out(bundles, tmp_path):
    path = bundles.path("mha")
    tensors = read_manifest(path).tensors
    ids = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "rows"]}
    foreign = {**tensors, "llm/dense.onnx": {"inputs": [ids], "outputs": []}}
    _, feeds = save(copied(path, tmp_path / "foreign", tensors=foreign), tmp_path / "inputs")
    assert list(feeds) == FILES[:-1]


def test_bf16_is_refused(bundles, tmp_path):
    path = copied(bundles.path("mha"), tmp_path / "bf16", precision=Precision.of("bf16"))
    with pytest.raises(BackendError, match=r"bf16, which neither .* --precision fp16 or fp32"):
        save(path, tmp_path / "inputs")
    assert not (tmp_path / "inputs").exists()


def test_files_that_are_there_are_kept(bundles, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(BundleError, match="expected a new or empty folder"):
        save(bundles.path("mha"), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.json"]


def test_nothing_is_left_behind_by_a_failure(bundles, tmp_path):
    with pytest.raises(InvalidInputError, match="was given without a prompt"):
        save(bundles.path("mha"), tmp_path / "inputs", image="cat.png")
    assert list(tmp_path.iterdir()) == []
