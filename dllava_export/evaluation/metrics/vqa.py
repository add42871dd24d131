"""Metric `vqa`: agreement with several people, VQA's normalisation."""

from __future__ import annotations

import re

from dllava_export.evaluation.metrics.metric import Metric, Truth

__all__ = ["Vqa", "vqa_normalised"]

_NUM_PEOPLE = 10
_ENOUGH = 3  # so many others make an answer wholly right

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten".split()
    )
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# Whoever wrote an answer may have left out one apostrophe of these. Words that are others
# without it (its, well, were, shed) are not here.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_WITH_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
}


class Vqa(Metric):
    """Agreement with people who answered the same question.

    An answer counts min(matches / 3, 1), where matches are people who said the same; the score
    is the mean of that over every choice of all people but one. With ten people that is 0.3,
    0.6, 0.9 for one, two, three of them, and 1 from four on.

    Source: Antol et al., VQA: Visual Question Answering, ICCV 2015, and its evaluation code
        (GT-Vision-Lab/VQA: PythonEvaluationTools/vqaEvaluation/vqaEval.py). As in EvalAI's
        server, both sides are always normalised, also where all people said the same.
    """

    name = "vqa"
    help = "agreement with ten people, VQA's normalisation"
    chosen_for = "ten answers to each question"

    def suits(self, truth: Truth) -> bool:
        """True where ten people answered."""
        return len(truth.answers) == _NUM_PEOPLE and not truth.choices

    def problem(self, truth: Truth) -> str | None:
        """Refuse a single answer: nobody is left to agree with."""
        if len(truth.answers) > 1:
            return None
        return (
            f"has one answer, {truth.answers[0]!r}, expected those of several people, ten as a "
            f"rule, for metric {self.name}"
        )

    def score(self, text: str, truth: Truth) -> float:
        """Return the mean over all people but one of min(matches / 3, 1)."""
        answer = vqa_normalised(text)
        matches = [vqa_normalised(one) == answer for one in truth.answers]
        others = (sum(matches) - match for match in matches)
        return sum(min(number / _ENOUGH, 1.0) for number in others) / len(matches)


def vqa_normalised(text: str) -> str:
    """Return an answer in lower case without articles and punctuation, numbers as digits."""
    words = (_NUMBERS.get(w, w) for w in _without_punctuation(text).lower().split())
    return " ".join(_WITH_APOSTROPHE.get(w, w) for w in words if w not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Drop a mark that has a space beside it, or stands in a text with 1,000; else part there.

    A period stays only before a digit.
    """
    text = " ".join(text.split())
    result = text
    has_number_comma = _NUMBER_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        is_dropped = has_number_comma or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_dropped else " ")
    return _PERIOD.sub("", result)
