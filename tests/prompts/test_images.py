from __future__ import annotations

import numpy as np
import pytest
import tolerances
from PIL import Image

from dllava_export.errors import InvalidInputError, UnsupportedModelError
from dllava_export.prompts.images import ImageProcessor, read_image

CLIP_336 = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    small = rng.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def reference(image: Image.Image, size: int) -> np.ndarray:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "CLIPImageProcessorPil"):
        pytest.skip("this transformers has no CLIP image processor that works on PIL alone")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return processor([image], return_tensors="np")["pixel_values"]


@pytest.mark.parametrize(
    ("width", "height"),
    [
        pytest.param(500, 375, id="wide"),
        pytest.param(375, 500, id="tall"),
        pytest.param(336, 336, id="already the size"),
        pytest.param(1001, 999, id="odd"),
        pytest.param(21, 64, id="smaller than the crop"),
    ],
)
def test_equals_clip_of_transformers(width, height):
    image = picture(width, height)
    pixel_values = ImageProcessor.from_config(CLIP_336, "square")([image])
    assert pixel_values.shape == (1, 3, 336, 336)
    assert pixel_values.dtype == np.float32
    np.testing.assert_allclose(
        pixel_values, reference(image, 336), rtol=0, atol=tolerances.PIXELS
    )


def test_pads_with_the_mean_colour_to_a_centred_square():
    image = picture(50, 31)
    square = Image.new("RGB", (50, 50), (122, 116, 104))
    square.paste(image, (0, 9))
    padded = ImageProcessor.from_config(CLIP_336, "pad")([image])
    np.testing.assert_allclose(padded, reference(square, 336), rtol=0, atol=tolerances.PIXELS)


def test_pads_the_sides_of_a_tall_image():
    image = picture(20, 41)
    square = Image.new("RGB", (41, 41), (122, 116, 104))
    square.paste(image, (10, 0))
    pad = ImageProcessor.from_config(CLIP_336, "pad")
    np.testing.assert_array_equal(pad([image]), pad([square]))


def test_do_pad_of_the_config_pads_too():
    processor = ImageProcessor.from_config({**CLIP_336, "do_pad": True}, None)
    assert processor == ImageProcessor.from_config(CLIP_336, "pad")


def test_reads_old_and_new_config_forms_alike():
    new = {
        **CLIP_336,
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
        "rescale_factor": 1 / 255,
        "do_pad": None,
        "image_processor_type": "CLIPImageProcessor",
    }
    assert ImageProcessor.from_config(new, None) == ImageProcessor.from_config(
        CLIP_336, "crop"
    )


def test_missing_values_are_those_of_clip():
    processor = ImageProcessor.from_config({}, None)
    image = picture(300, 260)
    np.testing.assert_allclose(
        processor([image]), reference(image, 224), rtol=0, atol=tolerances.PIXELS
    )


def test_resizes_to_height_and_width_without_keeping_the_ratio():
    config = {**CLIP_336, "size": {"height": 12, "width": 10}, "crop_size": 10}
    pixel_values = ImageProcessor.from_config(config, None)([picture(300, 100)])
    assert pixel_values.shape == (1, 3, 10, 10)


def test_path_pil_and_array_give_the_same(tmp_path):
    image = picture(64, 48)
    image.save(tmp_path / "a.png")
    processor = ImageProcessor.from_config({**CLIP_336, "size": 24, "crop_size": 24}, "pad")
    batch = processor([str(tmp_path / "a.png"), tmp_path / "a.png", image, np.asarray(image)])
    assert batch.shape == (4, 3, 24, 24)
    for row in batch[1:]:
        np.testing.assert_array_equal(row, batch[0])


def test_no_images_give_an_empty_batch():
    assert ImageProcessor.from_config(CLIP_336, None)([]).shape == (0, 3, 336, 336)


def test_applies_the_exif_orientation(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter to the left
    image.save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)
    config = {**CLIP_336, "size": 4, "crop_size": 4}
    processor = ImageProcessor.from_config(config, "pad")
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(processor([opened]), processor([upright]))


def save_16_bit(path):
    Image.fromarray(np.full((2, 2), 0x80FF, np.uint16)).save(path)


def save_int32(path):
    Image.fromarray(np.full((2, 2), 0x80FF, np.int32)).save(path)


def save_palette(path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 128, 128, 128])
    image.save(path)


def save_transparent_palette(path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 128, 128, 128])
    image.save(path, transparency=bytes([255, 0]))


def save_animation(path):
    frames = [Image.new("RGB", (2, 2), (shade, shade, shade)) for shade in (128, 0)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("save", "name", "colour"),
    [
        pytest.param(save_16_bit, "a.png", (128,) * 3, id="16-bit grey"),
        pytest.param(save_int32, "a.tiff", (128,) * 3, id="32-bit integers of 16 bits"),
        pytest.param(save_palette, "a.png", (128,) * 3, id="palette"),
        pytest.param(save_transparent_palette, "a.png", (255,) * 3, id="transparent palette"),
        pytest.param(save_animation, "a.gif", (128,) * 3, id="first frame"),
        pytest.param(lambda path: Image.new("L", (2, 2), 128).save(path), "a.png", (128,) * 3,
                     id="grey"),
        pytest.param(lambda path: Image.new("1", (2, 2), 1).save(path), "a.png", (255,) * 3,
                     id="black and white"),
        pytest.param(lambda path: Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(path), "a.png",
                     (255,) * 3, id="transparent"),
        pytest.param(lambda path: Image.new("LA", (2, 2), (128, 255)).save(path), "a.png",
                     (128,) * 3, id="opaque grey with alpha"),
        pytest.param(lambda path: Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(path),
                     "a.tiff", (255, 0, 0), id="CMYK"),
    ],
)  # fmt: skip
def test_reads_every_mode_as_rgb(tmp_path, save, name, colour):
    save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == colour


def test_missing_file(tmp_path):
    with pytest.raises(
        InvalidInputError, match=r"cat\.png does not exist; .*Check the path\."
    ):
        read_image(tmp_path / "cat.png")


def test_folder_for_a_file(tmp_path):
    with pytest.raises(InvalidInputError, match=r"is not a file; .*Pass an image file\."):
        read_image(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "cat.png").touch()
    with pytest.raises(InvalidInputError, match=r"cat\.png has 0 bytes; .*again\."):
        read_image(tmp_path / "cat.png")


def test_text_for_an_image(tmp_path):
    (tmp_path / "cat.png").write_text("not an image")
    with pytest.raises(InvalidInputError, match=r"cat\.png \(12 bytes\) cannot be decoded"):
        read_image(tmp_path / "cat.png")


@pytest.mark.parametrize("name", ["cat.png", "cat.jpg", "cat.bmp"])
def test_truncated_file(tmp_path, name):
    path = tmp_path / name
    picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InvalidInputError, match=r"cannot be decoded: .*complete image"):
        ImageProcessor.from_config(CLIP_336, "pad")([path])


def test_decompression_bomb(tmp_path, monkeypatch):
    picture(100, 100).save(tmp_path / "cat.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InvalidInputError, match="exceeds limit"):
        read_image(tmp_path / "cat.png")


def test_float_image(tmp_path):
    image = Image.fromarray(np.full((2, 2), 0.5, np.float32))
    image.save(tmp_path / "cat.tiff")
    with pytest.raises(InvalidInputError, match=r"Image file .*cat\.tiff has mode 'F'"):
        read_image(tmp_path / "cat.tiff")
    with pytest.raises(
        InvalidInputError, match=r"mode 'F' with values 0\.5 to 0\.5; expected 8"
    ):
        ImageProcessor.from_config(CLIP_336, None)([image])


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.zeros((4, 4, 3), np.float32), id="dtype"),
        pytest.param(np.zeros((3, 4, 4), np.uint8), id="channels first"),
        pytest.param(np.zeros((4, 4), np.uint8), id="no channels"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), id="empty"),
    ],
)
def test_array_of_another_form(array):
    with pytest.raises(InvalidInputError, match=r"expected \[height, width, 3\] and uint8"):
        ImageProcessor.from_config(CLIP_336, None)([array])


def test_strip_of_an_image():
    strip = np.zeros((1, 201, 3), np.uint8)
    with pytest.raises(InvalidInputError, match=r"Image is 201 x 1 pixels; .* 200 times"):
        ImageProcessor.from_config(CLIP_336, "square")([strip])
    assert ImageProcessor.from_config(CLIP_336, "pad")([strip]).shape == (1, 3, 336, 336)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"size": {"longest_edge": 9}}, "has size {'longest_edge': 9}; expected"),
        pytest.param(
            {"crop_size": {"height": 2, "width": 3}}, "height 2 and width 3, expected"
        ),
        pytest.param({"size": 100}, "resizes to 100 and crops to 336 pixels"),
        pytest.param({"do_resize": False}, "has do_resize false, expected true"),
        pytest.param({"size": 10**9}, "resizes to 1000000000 .*, and edges of at most 8192"),
        pytest.param({"size": 10**9, "crop_size": 10**9}, "a square of at most 8192 pixels"),
        pytest.param(
            {"resample": 9}, "has resample 9, expected one of Pillow's filters, 0, 1"
        ),
        pytest.param(
            {"rescale_factor": 1e99}, r"has 1e\+99 in rescale_factor, expected a fin"
        ),
        pytest.param(
            {"image_mean": [0.5, "a", 1]}, "has 'a' in image_mean, expected a finite"
        ),
        pytest.param({"image_std": 0}, "has 0 in image_std, expected a finite number other"),
        pytest.param({"image_std": [1.0]}, "has 1 values in image_std, expected 3"),
    ],
)
def test_config_of_another_kind(change, message):
    with pytest.raises(UnsupportedModelError, match=message):
        ImageProcessor.from_config({**CLIP_336, **change}, None)


def test_aspect_ratio_of_another_kind():
    with pytest.raises(
        UnsupportedModelError, match="image_aspect_ratio is 'anyres', expected"
    ):
        ImageProcessor.from_config(CLIP_336, "anyres")
