from __future__ import annotations

import pytest

from dllava_export.errors import SettingError
from dllava_export.evaluation.metrics.metric import Truth, normalised
from dllava_export.evaluation.metrics.table import METRICS, metric_by_name, suitable_metric
from dllava_export.evaluation.metrics.vqa import vqa_normalised
from dllava_export.evaluation.proportions import Proportion

OPTIONS = ("a dog", "a cat", "the moon")


def score(metric: str, text: str, *answers: str, choices: tuple[str, ...] = ()) -> float:
    return metric_by_name(metric).score(text, Truth(answers, choices))


def test_normalised():
    assert normalised("\tTwo  Words\n") == "two words"


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("A  Cat.\n", ("a cat.",), 1),
        ("a cat", ("a cat.",), 0),
        ("cat", ("dog", "Cat"), 1),
        ("", ("a",), 0),
    ],
)
def test_exact(text, answers, right):
    assert score("exact", text, *answers) == right


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("There are 5 digits.", ("5",), 1),
        ("There are 15 digits.", ("5",), 0),
        ("A CAT  sits", ("dog", "a cat"), 1),
        ("concatenate", ("cat",), 0),
        ("这是一只猫。", ("猫",), 1),
        ("It costs $5.", ("$5",), 1),
    ],
)
def test_contains(text, answers, right):
    assert score("contains", text, *answers) == right


# VQA.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("an apple\ta day", "apple day"),
        ("dont know", "don't know"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("its", "its"),
        ("red, white", "red white"),  # a space beside it: dropped
        ("red,white", "red white"),  # none: parted there
        ("1,000 red/white", "1000 redwhite"),  # a number with a comma: all marks dropped
        ("3.5", "3.5"),  # a period before a digit stays
        ("5 p.m.", "5 pm"),
        ("yes!", "yes"),
        ("t-shirt", "t shirt"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert vqa_normalised(text) == expected


@pytest.mark.parametrize(
    ("num_matches", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # (9 · 1/3 + 1 · 0) / 10
        (2, 0.6),  # (8 · 2/3 + 2 · 1/3) / 10
        (3, 0.9),  # (7 · 1 + 3 · 2/3) / 10
        (4, 1.0),  # each choice of nine has three
        (10, 1.0),
    ],
)
def test_vqa_leaves_one_out(num_matches, expected):
    answers = ["the Cat"] * num_matches + ["dog"] * (10 - num_matches)
    assert score("vqa", "cat.", *answers) == pytest.approx(expected)


def test_vqa_needs_several_people():
    problem = metric_by_name("vqa").problem(Truth(("cat",)))
    assert problem.startswith("has one answer, 'cat', expected those of several people")


# POPE.


@pytest.mark.parametrize(
    ("text", "says_yes"),
    [
        ("Yes", True),
        ("No, there is none.", False),
        ("There is not any.", False),
        ("Yes. No doubt.", True),  # only the first sentence counts
        ("Nothing", True),
        ("", True),
    ],
)
def test_pope_reads_yes_and_no(text, says_yes):
    assert score("pope", text, "yes") == says_yes
    assert score("pope", text, "No") == (not says_yes)


def test_pope_counts():
    # TP 2, FP 1, FN 2, TN 1.
    truths = ["yes", "yes", "no", "yes", "yes", "no"]
    said = ["Yes", "yes.", "yes", "No", "no", "No"]
    judged = [(text, Truth((truth,))) for text, truth in zip(said, truths, strict=True)]
    metric = metric_by_name("pope")
    assert [metric.score(text, truth) for text, truth in judged] == [1, 1, 0, 0, 0, 1]
    assert metric.details(judged) == {
        "precision": Proportion(2, 3),  # TP / (TP + FP)
        "recall": Proportion(2, 4),  # TP / (TP + FN)
        "F1": pytest.approx(4 / 7),  # 2 · 2 / (2 · 2 + 1 + 2)
        "yes-rate": Proportion(3, 6),
    }


def test_pope_where_nobody_says_yes():
    found = metric_by_name("pope").details([("no", Truth(("no",)))])
    assert (found["precision"], found["F1"]) == (Proportion(0, 0), None)


# Multiple choice.


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B. a cat", 1), ("(B) a cat", 1),
        ("B: a cat", 1), ("The answer is B.", 1), ("the answer is: (B)", 1), ("A cat.", 1),
        ("A", 0), ("A. a cat", 0), ("a dog", 0), ("D", 0), ("Because", 0), ("", 0),
        ("I think a cat", 0),
    ],
)  # fmt: skip
def test_multiple_choice(text, right):
    assert score("multiple-choice", text, "B", choices=OPTIONS) == right


def test_multiple_choice_without_options_in_the_file():
    assert score("multiple-choice", "E.", "E") == 1
    assert metric_by_name("multiple-choice").problem(Truth(("E",))) is None


def test_multiple_choice_needs_a_letter():
    problem = metric_by_name("multiple-choice").problem(Truth(("a bird",), OPTIONS))
    assert problem == (
        "has the answer 'a bird', expected the letter of an option, A to C, for metric "
        "multiple-choice"
    )


# All of them.


@pytest.mark.parametrize(
    ("truths", "name"),
    [
        pytest.param([Truth(("A",), OPTIONS)], "multiple-choice", id="options"),
        pytest.param([Truth(("yes",)), Truth(("No",))], "pope", id="yes and no"),
        pytest.param([Truth(("yes",) * 10)], "vqa", id="ten people"),
        pytest.param([Truth(("yes",)), Truth(("2",))], "exact", id="yes and others"),
        pytest.param([Truth(("a", "b"))], "exact", id="two answers"),
        pytest.param([Truth(("A",), OPTIONS), Truth(("A",))], "exact", id="not all options"),
    ],
)
def test_the_metric_of_a_file(truths, name):
    assert suitable_metric(truths).name == name


def test_names_are_unique():
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_an_unknown_metric():
    message = (
        r"metric must be one of multiple-choice, pope, .*, got 'popes'\. Did you mean 'pope'"
    )
    with pytest.raises(SettingError, match=message):
        metric_by_name("popes")
