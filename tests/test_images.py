"""Image files of all kinds become images like the data set's; what is no image is named."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.Image import Resampling, Transpose

from fashion_jax.images import MAX_PIXELS, read_image

# What turns the upright picture into what a camera with this orientation stores.
STORED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def shoe(splits) -> np.ndarray:
    return np.asarray(splits.test.images[0])


def read(directory, picture, suffix=".png", *, light_on_dark=None, **options) -> np.ndarray:
    path = directory / f"picture{suffix}"
    picture.save(path, **options)
    return read_image(path, light_on_dark=light_on_dark)


def paper(size, shade, *boxes, mode="L") -> Image.Image:
    """A picture of one shade with boxes (left, upper, right, lower) of others."""
    picture = Image.new(mode, size, shade)
    for box, other in boxes:
        picture.paste(other, box)
    return picture


def difference(image, original) -> float:
    return np.abs(image.astype(float) - original.astype(float)).mean()


def test_the_data_set_s_own_images_are_taken_as_they_are(tmp_path, splits):
    for image in splits.test.images[::50]:
        for pixels in (image, 255 - image):
            np.testing.assert_array_equal(read(tmp_path, Image.fromarray(pixels)), image)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16", "CMYK"])
def test_every_mode_gives_the_same_image(tmp_path, shoe, mode):
    deep = mode == "I;16"
    picture = Image.fromarray(shoe * np.uint16(257)) if deep else Image.fromarray(shoe).convert(mode)
    image = read(tmp_path, picture, ".jpg" if mode == "CMYK" else ".png")
    assert difference(image, shoe) <= (5 if mode == "CMYK" else 0)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [(".png", {}, 0), (".jpg", {"quality": 95}, 2), (".webp", {"lossless": True}, 0)],
)
def test_exif_rotation_is_undone(tmp_path, shoe, orientation, suffix, options, tolerance):
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.fromarray(shoe).transpose(STORED[orientation])
    assert difference(read(tmp_path, stored, suffix, exif=exif, **options), shoe) <= tolerance


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("background", [0, 255])
def test_enlarged_and_padded_images_come_back(tmp_path, splits, background, mode):
    """Whole pixels are enlarged, so that their means are exact; what is left comes from extents below 28."""
    differences = []
    for original in splits.test.images[:50]:
        picture = Image.fromarray(original ^ background).resize((280, 280), Resampling.NEAREST)
        picture = ImageOps.expand(picture, (30, 5, 70, 111), background).convert(mode)
        differences.append(difference(read(tmp_path, picture), original))
    assert np.median(differences) < 1e-9
    assert np.mean(differences) < 4


@pytest.mark.parametrize(
    ("picture", "rows", "columns", "shades"),
    [
        # The longest edge becomes 28 and the rest is centered, the wider margin above.
        (paper((900, 700), 255, ((300, 40, 500, 440), 0)), (0, 27), (7, 20), {255}),
        (paper((900, 700), 255, ((100, 300, 660, 480), 0)), (10, 18), (0, 27), {255}),
        # A grey background becomes black.
        (paper((300, 300), 200, ((10, 50, 290, 190), 0), ((90, 90, 210, 150), 100)), (7, 20), (0, 27), {128, 255}),
        # What is within 5% of the background is cropped.
        (paper((100, 100), 255, ((10, 10, 90, 90), 245), ((40, 30, 60, 70), 0)), (0, 27), (7, 20), {255}),
        # An object along one whole side is none of the background.
        (paper((10, 100), 255, ((0, 0, 4, 100), 0)), (0, 27), (14, 14), {255}),
        # Cut out on a transparent background, the object is light whatever its shade.
        (paper((100, 100), (77, 0), ((20, 0, 80, 100), (20, 255)), mode="LA"), (0, 27), (6, 22), {235}),
        (paper((100, 100), (77, 0), ((20, 0, 80, 100), (235, 255)), mode="LA"), (0, 27), (6, 22), {235}),
        # A half transparent object shows half of the background.
        (paper((28, 28), (0, 255), ((5, 5, 20, 20), (200, 128)), mode="LA"), (5, 19), (5, 19), {100}),
    ],
)
def test_where_the_object_lies_and_how_light_it_is(tmp_path, picture, rows, columns, shades):
    image = read(tmp_path, picture)
    for axis, (first, last) in ((1, rows), (0, columns)):
        lit = np.flatnonzero(image.any(axis=axis))
        assert (lit[0], lit[-1]) == (first, last)
    assert set(np.unique(image)) - {0} <= shades


def test_the_border_s_verdict_and_the_object_s_can_be_overridden(tmp_path):
    opaque = paper((28, 28), 200, ((5, 5, 20, 20), 250))
    cut_out = paper((28, 28), (77, 0), ((5, 5, 20, 20), (235, 255)), mode="LA")
    for picture, given, shades in (
        (opaque, None, {5, 55}),
        (opaque, False, {5, 55}),
        (opaque, True, {200, 250}),
        (cut_out, None, {0, 235}),
        (cut_out, False, {0, 20}),
    ):
        assert set(np.unique(read(tmp_path, picture, light_on_dark=given))) == shades


def test_a_transparent_shade_of_16_bits_is_that_of_8(tmp_path):
    levels = np.full((100, 100), 30, np.uint8)
    levels[20:80, 40:60] = 31
    twin = read(tmp_path, Image.fromarray(levels), transparency=30)
    image = read(tmp_path, Image.fromarray(levels * np.uint16(257)), transparency=30 * 257)
    np.testing.assert_array_equal(image, twin)
    assert twin.max() > 200


def png(width: int, height: int) -> bytes:
    """A PNG file of any size with hardly any content."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a PNG, JPEG or WebP image"),
        (b"hello", "is not a PNG, JPEG or WebP image"),
        (b"GIF89a" + bytes(100), "is not a PNG, JPEG or WebP image"),
        (png(100_000, 100_000), f"too large.*{MAX_PIXELS:,}"),
        (png(MAX_PIXELS // 1000, 1001), f"too large.*{MAX_PIXELS:,}"),
        (png(0, 5), "is not a PNG|is damaged"),
        (png(50, 50), "is damaged"),
    ],
    ids=["empty", "text", "another format", "bomb", "too large", "no width", "no rows"],
)
def test_what_is_no_image_is_named(tmp_path, content, message):
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_picture_without_an_object_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        read_image(tmp_path / "no.png")
    noise = np.random.default_rng(0).normal(200, 3, (300, 400)).clip(190, 210).astype(np.uint8)
    for picture in (Image.fromarray(noise), *(Image.new("L", (side, side), 130) for side in (1, 28, 100))):
        with pytest.raises(ValueError, match=r"picture\.png shows nothing that is (lighter|darker)"):
            read(tmp_path, picture)


@pytest.mark.parametrize("shade", [200, 252, 255])
@pytest.mark.parametrize(("given", "found"), [(True, "lighter"), (False, "darker")])
def test_an_object_on_the_wrong_side_of_its_background_is_an_error(tmp_path, shade, given, found):
    picture = paper((100, 100), shade, ((30, 30, 70, 70), 20))
    picture = picture if given else ImageOps.invert(picture)
    with pytest.raises(ValueError, match=f"nothing that is {found} than its background.* light_on_dark={not given}"):
        read(tmp_path, picture, light_on_dark=given)
    np.testing.assert_array_equal(read(tmp_path, picture), read(tmp_path, picture, light_on_dark=not given))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_damaged_files_give_an_image_or_an_error_with_their_name(tmp_path, shoe, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"picture{suffix}"
    read(tmp_path, Image.fromarray(shoe).resize((90, 90)), suffix)
    whole = path.read_bytes()
    failed = 0
    for trial in range(200):
        content = bytearray(whole)
        for position in rng.integers(0, len(content), 4):
            content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content if trial % 3 else whole[: rng.integers(1, len(whole))])
        try:
            assert read_image(path).shape == (28, 28)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            failed += 1
    assert failed > 60
