from __future__ import annotations

import json

import numpy as np
import pytest
from training_factory import (
    IMAGE_TOKENS,
    dynamic_llava,
    read_data,
    record,
    words,
    write_data,
)

from dllava_export.training.data import Batch, DataOrder
from dllava_export.training.settings import BadRecordError, TrainingError

EOS, IGNORED = 2, -100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return dynamic_llava(tmp_path_factory.mktemp("training_data"))


def sample_of(checkpoint, tmp_path, entry, **changes):
    data = read_data(checkpoint, write_data(tmp_path, [entry]), **changes)
    return data.sample(data.records[0])


def test_labels_are_the_answer_and_its_end(checkpoint, tmp_path):
    sample = sample_of(checkpoint, tmp_path, record("0.png", "w7 w8 w9"))
    num_rows = len(sample.input_ids)
    assert sample.input_ids[-4:].tolist() == [7, 8, 9, EOS]
    assert sample.labels[-4:].tolist() == [7, 8, 9, EOS]
    assert set(sample.labels[:-4]) == {IGNORED}
    assert sample.answer_start == num_rows - 4


def test_the_image_takes_its_rows_before_the_question(checkpoint, tmp_path):
    sample = sample_of(checkpoint, tmp_path, record("0.png", "w7"))
    rows = np.flatnonzero(sample.input_ids == -200)
    assert rows.tolist() == list(range(rows[0], rows[0] + IMAGE_TOKENS))
    # "w5 w6", then "ASSISTANT" and ":", which the tokenizer does not know.
    assert sample.input_ids[rows[-1] + 1 :].tolist() == [5, 6, 0, 0, 7, EOS]
    assert sample.input_ids[0] == 1
    assert sample.pixel_values.shape == (3, 84, 84)


@pytest.mark.parametrize(
    "question",
    [
        pytest.param("<image>\nw5 w6", id="in front"),
        pytest.param("w5 w6\n<image>", id="behind"),
        pytest.param("w5 <image> w6", id="inside"),
    ],
)
def test_the_placeholder_moves_to_the_front_of_its_turn(checkpoint, tmp_path, question):
    sample = sample_of(checkpoint, tmp_path, record("0.png", question=question))
    front = sample_of(checkpoint, tmp_path, record("0.png"))
    assert sample.input_ids.tolist() == front.input_ids.tolist()


def test_all_answers_are_labelled_and_the_last_is_the_answer(checkpoint, tmp_path):
    sample = sample_of(checkpoint, tmp_path, record("0.png", "w10 w11", "w12"))
    labelled = sample.labels != IGNORED
    assert sample.labels[labelled].tolist() == [10, 11, EOS, 12, EOS]
    assert sample.answer_start == len(sample.labels) - 2
    # Between them: "USER", ":", "w9", "ASSISTANT", ":".
    assert sample.input_ids[-10:].tolist() == [10, 11, EOS, 0, 0, 9, 0, 0, 12, EOS]


def test_an_image_may_belong_to_a_later_question(checkpoint, tmp_path):
    entry = record("0.png", "w10", "w12", question="w5")
    entry["conversations"][2]["value"] = "w9 <image>"
    sample = sample_of(checkpoint, tmp_path, entry)
    image = np.flatnonzero(sample.input_ids == -200)
    assert image[0] > np.flatnonzero(sample.input_ids == 10)[0]
    assert sample.input_ids[image[-1] + 1 :].tolist() == [9, 0, 0, 12, EOS]


def test_samples_are_padded_on_the_right(checkpoint, tmp_path):
    path = write_data(tmp_path, [record("0.png", "w7"), record("1.png", words(5))])
    data = read_data(checkpoint, path)
    batch = Batch.from_samples([data.sample(entry) for entry in data.records])
    assert batch.input_ids[0, -4:].tolist() == [0] * 4
    assert batch.labels[0, -4:].tolist() == [IGNORED] * 4
    assert batch.is_answer.sum(1).tolist() == [2, 6]
    assert batch.is_image.sum(1).tolist() == [IMAGE_TOKENS] * 2
    assert batch.pixel_values.shape == (2, 3, 84, 84)


def test_text_without_an_image_will_do_for_a_plain_llava(checkpoint, tmp_path):
    entry = record(None, "w7", question="w5")
    sample = sample_of(checkpoint, tmp_path, entry, needs_image=False)
    assert sample.pixel_values is None
    assert (sample.input_ids >= 0).all()
    assert Batch.from_samples([sample]).pixel_values is None


def turns(*values):
    roles = ("human", "gpt")
    return {
        "conversations": [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)],
        "image": "0.png",
    }


BAD_RECORDS = [
    pytest.param(["text"], "record 1 is a JSON list", id="no object"),
    pytest.param({"image": "0.png"}, "conversations 'None'", id="no turns"),
    pytest.param(
        record("nothing.png"), r"\(id 'a'\): the image .*nothing.png does not", id="no file"
    ),
    pytest.param(record(None, question="w5"), "has no image, and the image", id="no image"),
    pytest.param(record(None), "has <image> but no image", id="placeholder alone"),
    pytest.param(record(question="w5"), "an image but no <image>", id="no placeholder"),
    pytest.param({**record(), "image": 5}, "the image 5, expected the name", id="image of 5"),
    pytest.param(turns("<image> w5", " \n"), "turn 1 is an empty answer", id="empty answer"),
    pytest.param(turns("<image> w5"), "ends with a question", id="no answer"),
    pytest.param(turns("<image> <image>", "w7"), "2 times <image>", id="two places"),
    pytest.param(
        turns("<image>", "w7 <image>"), "an answer, contains <image>", id="in answer"
    ),
    pytest.param(
        {**record(), "conversations": [{"from": "gpt", "value": "w7"}]},
        "turn 0 is from 'gpt', expected text from 'human'",
        id="role",
    ),
    pytest.param(
        record("0.png", words(600)),
        r"tokens \(36 of them image tokens\), the last answer ends beyond the 512",
        id="too long",
    ),
]


@pytest.mark.parametrize(("entry", "message"), BAD_RECORDS)
def test_a_bad_record_stops_with_file_and_record(checkpoint, tmp_path, entry, message):
    path = write_data(tmp_path, [record(), entry])
    with pytest.raises(BadRecordError, match=message) as error:
        read_data(checkpoint, path)
    assert str(error.value).startswith("chats.json, record 1")


@pytest.mark.parametrize(("entry", "message"), BAD_RECORDS)
def test_a_bad_record_is_skipped_and_counted(checkpoint, tmp_path, entry, message):
    path = write_data(tmp_path, [entry, record()])
    data = read_data(checkpoint, path, on_bad_record="skip")
    assert len(data.records) == 1
    assert len(data.skipped) == 1


def test_a_token_outside_the_vocabulary_is_named(checkpoint, tmp_path):
    path = write_data(tmp_path, [record("0.png", "w100")])
    with pytest.raises(BadRecordError, match="token id 100, expected 0 to 49"):
        read_data(checkpoint, path, vocab_size=50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[{", "cannot be read as JSON", id="no JSON"),
        pytest.param("{}", "holds a JSON dict, expected a list", id="object"),
        pytest.param("[]", "has 0 records, expected at least one", id="empty"),
    ],
)
def test_a_bad_file_always_stops(checkpoint, tmp_path, text, message):
    path = tmp_path / "chats.json"
    path.write_text(text)
    with pytest.raises(TrainingError, match=message):
        read_data(checkpoint, path, on_bad_record="skip")


def test_nothing_left_after_skipping_stops(checkpoint, tmp_path):
    path = write_data(tmp_path, [record("nothing.png")])
    with pytest.raises(TrainingError, match=r"can be used, the first: chats.json, record 0"):
        read_data(checkpoint, path, on_bad_record="skip")


def test_an_image_that_cannot_be_decoded_shows_when_it_is_drawn(checkpoint, tmp_path):
    path = write_data(tmp_path, [record("0.png"), record("1.png")])
    (tmp_path / "0.png").write_text("no picture")
    data = read_data(checkpoint, path)
    with pytest.raises(BadRecordError, match=r"record 0 .*0.png .* cannot be decoded"):
        data.sample(data.records[0])
    data = read_data(checkpoint, path, on_bad_record="skip")
    samples = data.samples(DataOrder(2, seed=0))
    names = {next(samples).name for _ in range(5)}
    assert names == {"chats.json, record 1 (id 'a')"}
    assert len(data.skipped) == 1
    (tmp_path / "1.png").write_text("no picture")
    with pytest.raises(TrainingError, match="None of 2 images can be decoded"):
        next(samples)


def test_images_come_from_the_folder_asked_for(checkpoint, tmp_path):
    write_data(tmp_path / "pictures", [])
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([record()]))
    data = read_data(checkpoint, path, image_folder=tmp_path / "pictures")
    assert data.records[0].image == tmp_path / "pictures" / "0.png"


def test_order_visits_every_record_once_per_epoch_and_goes_on_where_it_was():
    order = DataOrder(7, seed=3)
    drawn = [order.draw() for _ in range(21)]
    epochs = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    later = DataOrder(7, seed=3, position=10)
    assert [later.draw() for _ in range(11)] == drawn[10:]
    assert [DataOrder(7, seed=4).draw() for _ in range(7)] != drawn[:7]
