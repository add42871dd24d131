from __future__ import annotations

import pytest

from dllava_export.reporting.byte_sizes import byte_unit, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GiB", 24 * 2**30),
        ("16GB", 16 * 10**9),
        ("80 GiB", 80 * 2**30),
        (" 1.5 gib ", 3 * 2**29),
        ("512MiB", 2**29),
        ("2TB", 2 * 10**12),
        ("7 b", 7),
    ],
)
def test_reads_sizes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["24", "GiB", "-1GiB", "0GB", "24G", "0.1B", "1e3MB", "", "1 2GB"]
)
def test_refuses_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"is no size; expected a number above 0 and a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (448 * 2**20, "448.0 MiB"),
        (13_500_000_000, "12.57 GiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_writes_sizes(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_unit_is_the_largest_that_is_filled():
    assert byte_unit(2**20 - 1) == ("KiB", 2**10)
    assert byte_unit(2**20) == ("MiB", 2**20)
