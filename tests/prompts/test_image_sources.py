from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dllava_export.errors import InvalidInputError
from dllava_export.prompts.image_sources import read_image


def picture(width=40, height=30, mode="RGB"):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def stored(form="PNG", image=None):
    file = io.BytesIO()
    (image or picture()).save(file, form)
    return file.getvalue()


def file_of(tmp_path, data):
    path = tmp_path / "picture with spaces.png"
    path.write_bytes(data)
    return path


PNG = stored()
ARRAY = np.asarray(picture())
BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(PNG, id="bytes"),
        pytest.param(bytearray(PNG), id="bytearray"),
        pytest.param(memoryview(PNG), id="memoryview"),
        pytest.param(io.BytesIO(PNG), id="BytesIO"),
        pytest.param(f"data:image/png;base64,{BASE64}", id="data URL"),
        pytest.param(f"DATA:;base64,{BASE64.rstrip('=')}", id="data URL without padding"),
        pytest.param(BASE64, id="base64"),
        pytest.param("\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
                     id="base64 in lines"),
        pytest.param(picture(), id="PIL"),
        pytest.param(Image.open(io.BytesIO(PNG)), id="lazy PIL"),
        pytest.param(ARRAY, id="array"),
        pytest.param(ARRAY[:, ::-1][:, ::-1], id="array that is a view"),
        pytest.param(np.dstack([ARRAY, np.full(ARRAY.shape[:2], 255, np.uint8)]), id="RGBA"),
        pytest.param(torch.from_numpy(ARRAY.copy()).permute(2, 0, 1), id="tensor"),
        pytest.param(torch.from_numpy(ARRAY.copy()), id="tensor, channels last"),
    ],
)  # fmt: skip
def test_one_picture_in_every_form(source):
    image = read_image(source)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), ARRAY)


def test_files(tmp_path):
    path = file_of(tmp_path, PNG)
    with path.open("rb") as file:
        file.read(5)
        forms = [path, str(path), path.as_uri(), file, file]  # a file may be read again
        for source in forms:
            np.testing.assert_array_equal(np.asarray(read_image(source)), ARRAY)


def test_grey_arrays():
    grey = ARRAY[..., 0]
    for source in (grey, grey[..., None], torch.from_numpy(grey.copy())[None]):
        np.testing.assert_array_equal(np.asarray(read_image(source)), np.dstack([grey] * 3))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(form):
    assert read_image(stored(form)).size == (40, 30)


def header_only(width, height):
    """A PNG of any size in a few bytes."""

    def chunk(kind, data):
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * min(width + 1, 100_000))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data)
    return png + chunk(b"IEND", b"")


class Closed(io.BytesIO):
    def seekable(self):
        raise RuntimeError("not now")


def closed_image():
    image = Image.open(io.BytesIO(PNG))
    image.close()
    return image


TRUNCATED = stored("JPEG", picture(400, 300))[:5000]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(None, "is a NoneType", id="none"),
        pytest.param(7, "is a int", id="number"),
        pytest.param([picture()], "is a list", id="list"),
        pytest.param({"bytes": PNG}, "is a dict", id="dict"),
        pytest.param(b"", "has 0 bytes", id="no bytes"),
        pytest.param(io.BytesIO(), "has 0 bytes", id="empty file"),
        pytest.param(b"nothing", "is none of PNG, JPEG", id="no picture"),
        pytest.param(stored("EPS"), "is none of PNG, JPEG", id="EPS"),
        pytest.param(TRUNCATED, "cannot be decoded", id="truncated"),
        pytest.param(Image.open(io.BytesIO(TRUNCATED)), "cannot be decoded", id="lazy PIL"),
        pytest.param(closed_image(), "cannot be decoded", id="closed PIL"),
        pytest.param(Image.new("RGB", (0, 0)), "has 0 x 0 pixels", id="0 x 0"),
        pytest.param(Image.new("RGB", (0, 5)), "has 0 x 5 pixels", id="0 x 5"),
        pytest.param(io.StringIO("x"), r"gives str, expected bytes.*'rb'", id="text file"),
        pytest.param(Closed(PNG), r"cannot be read \(not now\)", id="a file that fails"),
        pytest.param("http://a.b/cat.png", "fetched from the network.*Download", id="http"),
        pytest.param("HTTPS://a.b/cat.png", "fetched from the network", id="https"),
        pytest.param("data:image/png;base64", "is no data: URL", id="data URL, no comma"),
        pytest.param("data:image/png;base64,a*b", "is no base64", id="data URL, no base64"),
        pytest.param("data:,hello", "is none of PNG", id="data URL of text"),
        pytest.param(BASE64[:60], "cannot be decoded", id="base64, truncated"),
        pytest.param("x" * 90_000, "text of 90000 characters", id="long text"),
        pytest.param("x" * 3000, r"does not exist|cannot be found", id="long name"),
        pytest.param("a\0b.png", r"does not exist|cannot be found", id="null byte"),
        pytest.param("a\ud800.png", r"does not exist|cannot be found", id="lone surrogate"),
        pytest.param("/dev/zero", "is not a file", id="device"),
        pytest.param(ARRAY / 255, "float64; expected", id="floats"),
        pytest.param(torch.zeros(3, 4, 4), "torch.float32; expected", id="float tensor"),
        pytest.param(torch.zeros(3, 4, 4).bfloat16(), "bfloat16; expected", id="bfloat16"),
        pytest.param(torch.zeros(4, dtype=torch.uint8), r"shape \[4\]", id="row"),
        pytest.param(header_only(65_000, 65_000), "cannot be decoded|pixels", id="pixels"),
        pytest.param(header_only(0, 5), "cannot be decoded|pixels", id="no pixels"),
    ],
)  # fmt: skip
def test_what_is_no_picture_gets_a_short_message(source, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        read_image(source)
    assert len(str(caught.value)) < 500


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="is not a file"):
        read_image(tmp_path / "pipe")


def test_too_many_pixels_are_refused_before_they_are_read():
    source = header_only(9000, 9900)  # below Pillow's own limit
    with pytest.raises(InvalidInputError, match="9000 x 9900 pixels; expected 1 to 89000000"):
        read_image(source)


BOMB = """
import resource, sys
from dllava_export.errors import InvalidInputError
from dllava_export.prompts.images import ImageProcessor
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for aspect in ("pad", "square"):
    try:
        ImageProcessor.from_config({}, aspect)([sys.argv[1]])
    except InvalidInputError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("width", [20_000, 60_000])
def test_a_strip_takes_no_memory(tmp_path, width):
    path = tmp_path / "strip.png"
    path.write_bytes(header_only(width, 1))
    result = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)],
        capture_output=True, text=True, check=True, timeout=60, cwd=Path.cwd(),
    )  # fmt: skip
    padded, strip, mebibytes = result.stdout.splitlines()
    assert "is padded to a square" in padded
    assert "at most 200 times the shorter one" in strip
    assert int(mebibytes) < 50
