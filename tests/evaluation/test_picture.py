from __future__ import annotations

import dataclasses
import sys

import numpy as np
import places
import pytest
import tolerances
from click.testing import CliRunner
from golden import CASES, load_case

from dllava_export import cli
from dllava_export.errors import CapacityError, InvalidInputError
from dllava_export.evaluation.answer_trace import AnswerTrace, image_scores, trace_answer
from dllava_export.evaluation.picture import PlacedText, draw, place_tokens
from dllava_export.passes.policies.registry import POLICIES

CAT = str(places.CAT)
IDS = [1, -200, 15, 27]


def trace(bundles, checkpoint="mha", max_new_tokens=12, **sparsity) -> AnswerTrace:
    prompt = {"prompt": "w5 w6"} if checkpoint == "mha" else {"input_ids": IDS}
    return trace_answer(
        bundles.path(checkpoint, **sparsity), image=CAT, max_new_tokens=max_new_tokens,
        num_threads=1, **prompt,
    )  # fmt: skip


# Scores.


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_official_code(bundles, name):
    case = load_case(name)
    session = bundles.session(case.checkpoint)
    scores = image_scores(
        bundles.path(case.checkpoint), session.manifest, case.input_ids[0],
        session.encode_images(case.images),
    )  # fmt: skip
    assert scores.dtype == np.float32
    np.testing.assert_allclose(
        scores, case.image_scores, rtol=tolerances.RELATIVE, atol=tolerances.SCORES
    )


@pytest.mark.parametrize("policy", POLICIES.names())
def test_the_best_scores_are_kept(bundles, policy):
    found = trace(bundles, **({} if policy == "predictor" else _policy(policy)))
    kept = found.kept_image_indices
    best = np.argsort(-found.scores, kind="stable")[: len(kept)]
    assert sorted(best) == list(kept)
    assert found.scores.shape == (36,)


def _policy(policy: str) -> dict[str, object]:
    rate = {} if POLICIES.get(policy).decides_text else {"output_text_keep_rate": 1.0}
    return {"policy": policy, **rate}


def test_scores_of_half_precision(bundles):
    full = trace(bundles, "gqa", max_new_tokens=1)
    half = trace_answer(
        bundles.path("gqa", precision="fp16"), image=CAT, input_ids=IDS, max_new_tokens=1,
        num_threads=1,
    )  # fmt: skip
    np.testing.assert_allclose(half.scores, full.scores, atol=tolerances.FLOAT16_SCORES)


# Traces.


@pytest.mark.parametrize("checkpoint", ["mha", "gqa"])
def test_a_trace_is_what_the_session_does(bundles, checkpoint):
    found = trace(bundles, checkpoint)
    session = bundles.session(checkpoint)
    prompt = {"prompts": ["w5 w6"]} if checkpoint == "mha" else {"input_ids": [IDS]}
    (answer,) = session.generate(images=[CAT], max_new_tokens=12, **prompt)
    assert len(found.pieces) == len(answer.token_ids) == 12
    if checkpoint == "mha":
        assert "".join(found.pieces) == answer.text
    else:
        assert "".join(found.pieces).split() == [str(token) for token in answer.token_ids]
    assert len(found.keep) == answer.num_fed_tokens == 11
    assert found.keep.sum() == answer.num_kept_tokens
    assert (found.lengths[-1] == session.cache_lengths[:, 0]).all()
    assert found.lengths.shape == (12, session.manifest.geometry.num_layers)
    added = np.diff(found.lengths[:, -1])
    assert (added == found.keep).all()


def test_kept_patches_are_those_of_the_session(bundles):
    found = trace(bundles)
    session = bundles.session("mha")
    ids = session.tokenizer.encode(session.tokenizer.render("w5 w6", with_image=True))
    kept = session.prefill([ids], session.image_processor([CAT])).kept_image_indices[0]
    assert found.kept_image_indices.tolist() == kept.tolist()
    assert found.kept_patches.shape == (6, 6)
    assert np.flatnonzero(found.kept_patches).tolist() == kept.tolist()


def test_the_picture_is_what_the_model_sees(bundles):
    found = trace(bundles, max_new_tokens=1)
    processor = bundles.session("mha").image_processor
    assert found.picture.shape == (processor.size, processor.size, 3)
    bar = [int(255 * mean) / 255 for mean in processor.mean]
    np.testing.assert_allclose(
        found.picture[0, 0], bar, atol=tolerances.SAME_MODEL
    )  # padded to a square
    assert 0 <= found.picture.min() < 0.1
    assert 0.8 < found.picture.max() <= 1


def test_a_dense_decoder_drops_nothing(bundles):
    found = trace(bundles, policy="none")
    assert found.scores is None
    assert found.kept_patches.all()
    assert found.keep.all()
    assert found.kv_share == 1.0


def test_a_prompt_without_an_image(bundles):
    found = trace_answer(
        bundles.path("mha"), image="none", prompt="w5", max_new_tokens=3, num_threads=1
    )
    assert (found.picture, found.scores) == (None, None)
    assert found.kept_image_indices.size == 0


def test_token_ids_stand_for_the_question(bundles):
    assert trace(bundles, "gqa", max_new_tokens=1).question == "1 <image> 15 27"


def test_an_answer_that_ends_by_itself(bundles, monkeypatch):
    from dllava_export.runtime.session import Session

    (answer,) = bundles.session("mha").generate(["w5 w6"], [CAT], max_new_tokens=12)
    end = answer.token_ids[3]
    monkeypatch.setattr(Session, "eos_token_ids", (end,))
    found = trace(bundles)
    assert len(found.pieces) == len(found.keep) == answer.token_ids.index(end)


def test_kv_share_by_hand(bundles):
    found = trace(bundles)
    dense, sparse = found.lengths[-1, 0], found.lengths[-1, -1]
    assert found.kv_share == pytest.approx((2 * dense + 2 * sparse) / (4 * dense))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"prompt": "w5"}, InvalidInputError, "none was given. Pass --image FILE",
                     id="no word about the image"),
        pytest.param({"image": CAT}, InvalidInputError, "Give either prompt or input_ids",
                     id="neither"),
        pytest.param({"image": CAT, "prompt": "w5", "input_ids": [5]}, InvalidInputError,
                     "Give either prompt or input_ids", id="both"),
        pytest.param({"image": CAT, "input_ids": [1, 5]}, InvalidInputError,
                     "there is an image, but no placeholder for it", id="no placeholder"),
        pytest.param({"image": "none", "input_ids": [1, -200]}, InvalidInputError,
                     "has 1 image placeholder", id="placeholder only"),
        pytest.param({"image": "no.png", "prompt": "w5"}, InvalidInputError,
                     "no.png does not exist", id="image"),
        pytest.param({"image": CAT, "input_ids": [-200] + [5] * 500}, CapacityError,
                     "The prompt has 536 tokens", id="too long"),
        pytest.param({"image": CAT, "prompt": "w5", "max_new_tokens": 0}, ValueError,
                     "max_new_tokens must be at least 1, got 0", id="no tokens"),
    ],
)  # fmt: skip
def test_requests_that_do_not_fit(bundles, arguments, error, message):
    with pytest.raises(error) as found:
        trace_answer(bundles.path("mha"), num_threads=1, **arguments)
    assert message in str(found.value)


# Text on the page.


def test_words_are_wrapped():
    placed = place_tokens(["The", " qu", "ick", " fox", ",", "\n", "ran"], 9)
    assert placed == [
        PlacedText(0, 0, 0, "The"),
        PlacedText(1, 0, 4, "qu"),
        PlacedText(2, 0, 6, "ick"),
        PlacedText(3, 1, 0, "fox"),
        PlacedText(4, 1, 3, ","),
        PlacedText(6, 2, 0, "ran"),
    ]


def test_long_words_are_broken():
    placed = place_tokens(["a ", "bcd", "efgh"], 4)
    assert placed == [
        PlacedText(0, 0, 0, "a"),
        PlacedText(1, 1, 0, "bcd"),
        PlacedText(2, 1, 3, "e"),
        PlacedText(2, 2, 0, "fgh"),
    ]


def test_white_space_starts_no_line_but_empty_lines_stay():
    placed = place_tokens(["abc", "  ", "d", "\n\n", " e", ""], 4)
    assert [(p.token, p.line, p.column) for p in placed] == [(0, 0, 0), (2, 1, 0), (4, 3, 0)]


def test_nothing_is_lost_on_the_page():
    pieces = ["ab cd", " ", "e\n", "fghij", " k"] * 20
    placed = place_tokens(pieces, 7)
    assert "".join(p.text for p in placed) == "".join("".join(pieces).split())
    assert max(p.column + len(p.text) for p in placed) <= 7


def test_no_text_has_no_place():
    assert place_tokens(["", " "], 5) == []


# Drawing.


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_draw(bundles, tmp_path, name, magic):
    draw(trace(bundles), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("change", ["dense", "no image", "no answer", "one token", "odd text"])
def test_draw_whatever_the_answer_is(bundles, tmp_path, change):
    found = trace(bundles, **({"policy": "none"} if change == "dense" else {}))
    if change == "no image":
        none = np.zeros(0, np.int64)
        found = dataclasses.replace(found, picture=None, scores=None, kept_image_indices=none)
    if change in ("no answer", "one token"):
        count = int(change == "one token")
        found = dataclasses.replace(
            found, pieces=found.pieces[:count], keep=found.keep[:0], lengths=found.lengths[:1]
        )
    if change == "odd text":
        pieces = ("$x^", "", " 日本", "\n", "_a$", "\x07", *found.pieces[6:])
        found = dataclasses.replace(found, pieces=pieces, question="$\\frac")
    draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_dropped_patches_are_dimmed(bundles, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shown = []
    original = Axes.imshow

    def imshow(axes, values, **options):
        shown.append(np.asarray(values))
        return original(axes, values, **options)

    monkeypatch.setattr(Axes, "imshow", imshow)
    found = trace(bundles)
    draw(found, tmp_path / "a.png")
    picture, scores = shown
    patch = len(picture) // 6
    changed = (picture != found.picture).any(-1).reshape(6, patch, 6, patch).any((1, 3))
    assert (changed == ~found.kept_patches).all()
    assert (scores == found.scores.reshape(6, 6)).all()


def test_drawing_leaves_the_old_file_when_it_fails(bundles, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(_figure, path, **_options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(InvalidInputError, match=r"a\.png cannot be written \(No space left"):
        draw(trace(bundles, max_new_tokens=1), tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_drawing_needs_no_pyplot(bundles, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    draw(trace(bundles, max_new_tokens=1), tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules


# The command.


def run(*arguments: object):
    return CliRunner().invoke(cli.main, ["visualize", *(str(a) for a in arguments)])


def test_command(bundles, tmp_path):
    options = ["--image", CAT, "--prompt", "w5", "--max-new-tokens", 3, "--threads", 1]
    result = run(bundles.path("mha"), *options, "-o", tmp_path / "a.png")
    assert (result.exit_code, result.stdout) == (0, f"Drew {tmp_path}/a.png\n"), result.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        pytest.param(["-o", "a.png"], 2, "Give either --prompt or --input-ids", id="no prompt"),
        pytest.param(["--prompt", "a"], 2, "Missing option '-o' / '--output'", id="no output"),
        pytest.param(["--prompt", "a", "-o", "no/a.png"], 2, "folder 'no' does not exist",
                     id="folder"),
        pytest.param(["--prompt", "a", "-o", "a.txt"], 1, "has suffix '.txt'", id="format"),
        pytest.param(["--prompt", "a", "-o", "a.png", "--image", CAT], 1,
                     "has no tokenizer, so it takes token ids", id="no tokenizer"),
    ],
)  # fmt: skip
def test_wrong_commands(bundles, tmp_path, monkeypatch, options, exit_code, message):
    monkeypatch.chdir(tmp_path)
    result = run(bundles.path("gqa"), *options)
    assert result.exit_code == exit_code, result.output
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []
