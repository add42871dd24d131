from __future__ import annotations

import pytest

from dllava_export.json_text import MAX_DEPTH, parse_json


@pytest.mark.parametrize("text", ['{"a": [1, "é"]}', '\ufeff{"a": [1, "é"]}'])
def test_reads_text_and_bytes_with_or_without_a_byte_order_mark(text):
    expected = {"a": [1, "é"]}
    assert parse_json(text) == parse_json(text.encode()) == expected


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_reads_up_to_the_depth_it_names():
    parse_json(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 2, 10**6):
        with pytest.raises(ValueError, match=f"deeper than the limit of {MAX_DEPTH} levels"):
            parse_json(nested(depth))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "Expecting property name", id="no JSON"),
        pytest.param(b"\xff\xfe", "can't decode byte", id="no UTF-8"),
        pytest.param(r'["\ud800"]', r"half of a surrogate pair in '\\ud800'", id="value"),
        pytest.param(r'{"\udfff": 1}', "half of a surrogate pair", id="key"),
        pytest.param("1" * 5000, "integer string conversion", id="long number"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_keys_that_stand_twice_are_refused_where_asked():
    text = '{"x": {"a": 1, "b": 2, "a": 3}}'
    assert parse_json(text) == {"x": {"a": 3, "b": 2}}
    with pytest.raises(ValueError, match="the key 'a' stands twice"):
        parse_json(text, unique_keys=True)
