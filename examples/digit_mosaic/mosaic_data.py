"""Mosaics of handwritten digits: pictures, questions and answers, all from one seed.

A picture is 192 x 192 pixels: 24 x 24 patches of 8 pixels, in 3 x 3 cells of 8 x 8 patches.
Each cell holds at most one digit of 16 x 16 pixels; most of the picture is empty.

Source    the digits are those of scikit-learn's `load_digits`, the test part of UCI's "Optical
          Recognition of Handwritten Digits": 1797 pictures of 8 x 8 pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

__all__ = [
    "CELLS_PER_SIDE",
    "MAX_DIGITS",
    "NUM_PATCHES",
    "PATCHES_PER_SIDE",
    "PATCH_SIZE",
    "PICTURE_SIZE",
    "PLACES",
    "Mosaic",
    "Question",
    "all_questions",
    "make_mosaic",
    "mosaic_rng",
    "place_question",
    "write_conversations",
]

Split = Literal["train", "test"]

PATCH_SIZE = 8
PATCHES_PER_SIDE = 24
NUM_PATCHES = PATCHES_PER_SIDE**2
PICTURE_SIZE = PATCH_SIZE * PATCHES_PER_SIDE
CELLS_PER_SIDE = 3
MAX_DIGITS = 6
PLACES = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
)
"""Names of the cells, in reading order."""

_CELL_SIZE = PICTURE_SIZE // CELLS_PER_SIDE
_DIGIT_SIZE = 16
_SHIFT = PATCH_SIZE  # digits lie at multiples of it
_NUM_TEST_DIGITS = 397
_SPLIT_SEED = 20
_INK = 0.35  # share of full ink from which a pixel counts
_MIN_INK_PIXELS = 4


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """A picture and what is in it.

    Attributes:
        pixels: [192, 192, 3] uint8, RGB.
        digits: Cell, 0-based in reading order → digit; only cells with one.
        has_ink: [576] bool. Patches with ink of a digit, row by row.
    """

    pixels: np.ndarray
    digits: dict[int, int]
    has_ink: np.ndarray


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its only right answer.

    Attributes:
        kind: `count`, `list`, `place`, `largest`, `sum` or `describe`.
        text: The question.
        answer: The answer, word for word.
    """

    kind: str
    text: str
    answer: str


@functools.cache
def _digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return [n, 16, 16] float32 ink in [0, 1], and [n] labels of a split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(data.images))
    chosen = order[_NUM_TEST_DIGITS:] if split == "train" else order[:_NUM_TEST_DIGITS]
    size = (_DIGIT_SIZE, _DIGIT_SIZE)
    large = [
        np.asarray(Image.fromarray(data.images[i].astype(np.float32)).resize(size, 2))
        for i in chosen
    ]
    return np.stack(large) / 16, data.target[chosen]


def mosaic_rng(seed: int, index: int) -> np.random.Generator:
    """Return the random numbers of one mosaic."""
    return np.random.default_rng([seed, index])


def make_mosaic(
    rng: np.random.Generator, split: Split, num_digits: tuple[int, int] = (1, MAX_DIGITS)
) -> Mosaic:
    """Draw a mosaic with digits of a split, between the two numbers, both inclusive."""
    images, labels = _digits(split)
    cells = rng.choice(len(PLACES), rng.integers(*num_digits, endpoint=True), replace=False)
    ground = rng.uniform(0, 50, 3).astype(np.float32)
    picture = np.broadcast_to(ground, (PICTURE_SIZE, PICTURE_SIZE, 3)).copy()
    ink = np.zeros((PICTURE_SIZE, PICTURE_SIZE), np.float32)
    digits = {}
    for cell in sorted(map(int, cells)):
        index = rng.integers(len(labels))
        digits[cell] = int(labels[index])
        digit = _varied(rng, images[index]) if split == "train" else images[index]
        row, column = np.array(divmod(cell, CELLS_PER_SIDE)) * _CELL_SIZE + _SHIFT * (
            rng.integers(0, (_CELL_SIZE - _DIGIT_SIZE) // _SHIFT + 1, 2)
        )
        place = slice(row, row + _DIGIT_SIZE), slice(column, column + _DIGIT_SIZE)
        ink[place] = digit
        colour = rng.uniform(150, 255, 3).astype(np.float32)
        picture[place] += digit[..., None] * (colour - ground)
    down, right = rng.integers(0, PICTURE_SIZE, 2)
    picture += _noise()[down : down + PICTURE_SIZE, right : right + PICTURE_SIZE]
    return Mosaic(picture.clip(0, 255).astype(np.uint8), digits, _ink_patches(ink))


def _varied(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Turn, shear, stretch and shift a digit a little, and make its strokes bolder or finer.

    There are only 1400 digits to learn from.
    """
    turn, shear = rng.uniform(-0.2, 0.2, 2)
    scale = rng.uniform(0.85, 1.15, 2)
    matrix = np.array([[1, shear - turn], [turn, 1]]) * scale
    centre = (_DIGIT_SIZE - 1) / 2
    shift = centre - matrix @ [centre, centre] + rng.uniform(-1, 1, 2)
    values = (*matrix[0], shift[0], *matrix[1], shift[1])
    image = Image.fromarray(digit).transform(
        digit.shape, Image.Transform.AFFINE, values, Image.Resampling.BILINEAR
    )
    return np.asarray(image) ** rng.uniform(0.6, 1.5)


@functools.cache
def _noise() -> np.ndarray:
    """Return [384, 384, 1] float32 to cut pieces from: drawing anew would take the longest."""
    rng = np.random.default_rng(_SPLIT_SEED)
    return 5 * rng.standard_normal((2 * PICTURE_SIZE, 2 * PICTURE_SIZE, 1), np.float32)


def _ink_patches(ink: np.ndarray) -> np.ndarray:
    side = PATCHES_PER_SIDE
    patches = (ink > _INK).reshape(side, PATCH_SIZE, side, PATCH_SIZE)
    return patches.sum((1, 3)).reshape(-1) >= _MIN_INK_PIXELS


def all_questions(mosaic: Mosaic, cell: int) -> list[Question]:
    """Return one question of each kind; `cell` is the place that is asked for."""
    values = list(mosaic.digits.values())
    return [
        Question("count", "How many digits are there?", str(len(values))),
        Question(
            "list", "Which digits are there, in reading order?", " ".join(map(str, values))
        ),
        place_question(mosaic, cell),
        Question("largest", "Which digit is the largest?", str(max(values))),
        Question("sum", "What is the sum of the digits?", _sum_text(values)),
        Question("describe", "Describe every digit with its place.", _description(mosaic)),
    ]


def place_question(mosaic: Mosaic, cell: int) -> Question:
    """Return the question for the digit in a cell."""
    answer = str(mosaic.digits.get(cell, "none"))
    return Question("place", f"Which digit is at the {PLACES[cell]}?", answer)


def _sum_text(values: list[int]) -> str:
    """Return the sum step by step: `3 + 4 = 7, 7 + 7 = 14`."""
    total, steps = values[0], []
    for value in values[1:]:
        steps.append(f"{total} + {value} = {total + value}")
        total += value
    return ", ".join(steps) or str(total)


def _description(mosaic: Mosaic) -> str:
    sentences = [
        f"The {place} holds a {mosaic.digits[cell]}."
        if cell in mosaic.digits
        else f"The {place} is empty."
        for cell, place in enumerate(PLACES)
    ]
    count = len(mosaic.digits)
    ending = "There is 1 digit" if count == 1 else f"There are {count} digits"
    return " ".join([*sentences, f"{ending} in total."])


def write_conversations(
    folder: Path, split: Split, seed: int, num_mosaics: int, *, kinds: tuple[str, ...] = ()
) -> Path:
    """Write mosaics as PNG files and questions as LLaVA's conversation JSON.

    Args:
        folder: New or existing folder; gets `questions.json` and `images/`.
        split: Which digits.
        seed: Of the mosaics.
        num_mosaics: How many.
        kinds: Ask these, in turn, one for each mosaic; all kinds of each by default.

    Returns:
        The JSON file. Each record has `kind` beside LLaVA's keys, and `digits` (place → digit)
        and `digit_patches` (indices of patches with ink).
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(num_mosaics):
        rng = mosaic_rng(seed, index)
        mosaic = make_mosaic(rng, split)
        name = f"images/{index:05}.png"
        Image.fromarray(mosaic.pixels).save(folder / name)
        questions = all_questions(mosaic, asked_cell(rng, mosaic))
        if kinds:
            kind = kinds[index % len(kinds)]
            questions = [question for question in questions if question.kind == kind]
        records += [_record(index, name, mosaic, question) for question in questions]
    path = folder / "questions.json"
    lines = ",\n".join(json.dumps(record) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return path


def asked_cell(rng: np.random.Generator, mosaic: Mosaic) -> int:
    """Draw a cell to ask for: one with a digit three times in four."""
    full = list(mosaic.digits)
    empty = [cell for cell in range(len(PLACES)) if cell not in mosaic.digits]
    return int(rng.choice(full if rng.random() < 0.75 else empty))


def _record(index: int, image: str, mosaic: Mosaic, question: Question) -> dict[str, object]:
    return {
        "id": f"{index:05}-{question.kind}",
        "image": image,
        "kind": question.kind,
        "digits": {PLACES[cell]: digit for cell, digit in mosaic.digits.items()},
        "digit_patches": np.flatnonzero(mosaic.has_ink).tolist(),
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
    }
