"""Image files of all kinds become images like the data set's; what is no image is named."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from PIL.Image import Resampling

from fashion_jax.images import MAX_PIXELS, read_folder, read_image

DOUBTFUL = pytest.mark.filterwarnings("ignore:.*may be cropped wrongly")


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


def grainy(levels, noise: float, rng) -> Image.Image:
    return Image.fromarray((levels + rng.normal(0, noise, np.shape(levels))).round().clip(0, 255).astype(np.uint8))


def photograph(image, rng, *, shade=255, depth=-1.0, dim=1.0, corners=1.0, blur=0, salt=0.0, noise=0.0):
    """A photograph, 600x600, of an image of the data set: darker (depth < 0) or lighter than what it lies on."""
    picture = ImageOps.expand(Image.fromarray(image).resize((400, 400), Resampling.BICUBIC), 100)
    cover = abs(depth) / 255 * np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)))
    object_shade = 0 if depth < 0 else 255
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, 600)])
    along = np.cos(angle := rng.uniform(0, 2 * np.pi)) * x + np.sin(angle) * y
    light = np.interp(along, (along.min(), along.max()), (dim, 1))
    light /= (1 + (corners**-0.5 - 1) * (x**2 + y**2) / 2) ** 2
    levels = light * (shade * (1 - cover) + object_shade * cover)
    return grainy(np.where(rng.random(levels.shape) < salt, rng.choice([0, 255], levels.shape), levels), noise, rng)


def difference(image, original) -> float:
    return np.abs(image.astype(float) - original.astype(float)).mean()


@pytest.fixture(scope="module")
def perfect(splits, tmp_path_factory) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images, and what photographs of them in even light give."""
    place, rng = tmp_path_factory.mktemp("perfect"), np.random.default_rng(0)
    return [(image, read(place, photograph(image, rng))) for image in splits.test.images[:8]]


@DOUBTFUL
@pytest.mark.parametrize(
    ("conditions", "suffix", "most"),
    [
        ({"noise": 8, "dim": 0.78, "corners": 0.6}, ".png", 6),
        ({"salt": 0.05}, ".png", 6),
        ({"blur": 3, "noise": 2}, ".jpg", 9),
        ({"shade": 40, "depth": 1, "noise": 8, "dim": 0.78}, ".png", 8),
        # What differs from the background by less than 5% is lost.
        ({"depth": -0.3, "noise": 4, "dim": 0.78}, ".png", 14),
    ],
)
def test_photographs_give_what_perfect_ones_give(tmp_path, perfect, conditions, suffix, most):
    rng, options = np.random.default_rng(0), {"quality": 30} if suffix == ".jpg" else {"compress_level": 0}
    pictures = [(photograph(image, rng, **conditions), wanted) for image, wanted in perfect]
    assert np.mean([difference(read(tmp_path, taken, suffix, **options), wanted) for taken, wanted in pictures]) < most


def test_the_data_set_s_own_images_are_taken_as_they_are(tmp_path, splits):
    for image in splits.test.images[::200]:
        for pixels in (image, 255 - image):
            np.testing.assert_array_equal(read(tmp_path, Image.fromarray(pixels)), image)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK"])
def test_every_mode_gives_the_same_image(tmp_path, shoe, mode):
    options = {"transparency": bytes([255] * 256)} if mode == "P" else {}
    image = read(tmp_path, Image.fromarray(shoe).convert(mode), ".jpg" if mode == "CMYK" else ".png", **options)
    assert difference(image, shoe) <= (5 if mode == "CMYK" else 0)


def test_bits_stored_in_sixteen_are_scaled(tmp_path, shoe):
    for bits in (8, 10, 12, 16):
        levels = np.rint(shoe / 255 * (2**bits - 1)).astype(np.uint16)
        np.testing.assert_array_equal(read(tmp_path, Image.fromarray(levels)), shoe)
    # A transparent shade too.
    levels = np.pad(np.full((60, 20), 31, np.uint8), 20, constant_values=30)
    deep, twin = Image.fromarray(levels * np.uint16(257)), Image.fromarray(levels)
    image = read(tmp_path, deep, transparency=30 * 257)
    np.testing.assert_array_equal(image, read(tmp_path, twin, transparency=30))
    assert image.max() > 200


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(
    ("suffix", "options", "most"), [(".png", {}, 0), (".jpg", {"quality": 95}, 2), (".webp", {"lossless": True}, 0)]
)
def test_exif_rotation_is_undone_whatever_else_is_odd(tmp_path, shoe, orientation, suffix, options, most):
    # The width is a text, and the model's name lies outside of the file.
    tags = (0x100, 2, 4, b"abc", 0x110, 2, 2**20, 2**30, 0x112, 3, 1, orientation)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x03\0" + struct.pack("<HHI4sHHIIHHII", *tags) + bytes(4)
    stored = Image.fromarray(shoe)
    image = read(tmp_path, stored, suffix, exif=exif, **options)
    stored.getexif()[0x112] = orientation
    assert difference(image, np.asarray(ImageOps.exif_transpose(stored))) <= most


def test_a_photograph_of_200_megapixels_is_read(tmp_path):
    picture = paper((16_384, 12_288), 240, ((4_000, 4_000, 8_000, 8_000), 20))
    np.testing.assert_array_equal(read(tmp_path, picture, ".jpg") > 250, True)


@pytest.mark.parametrize("background", [0, 255])
def test_enlarged_and_padded_images_come_back(tmp_path, splits, background):
    """Whole pixels are enlarged, so that their means are exact; what is left comes from extents below 28."""
    differences = []
    for original in splits.test.images[:20]:
        picture = Image.fromarray(original ^ background).resize((280, 280), Resampling.NEAREST)
        picture = ImageOps.expand(picture, (30, 5, 70, 111), background)
        differences.append(difference(read(tmp_path, picture), original))
    assert np.median(differences) < 1e-9
    assert np.mean(differences) < 4


@pytest.mark.parametrize(
    ("picture", "rows", "columns", "shades"),
    [
        # The longest edge becomes 28 and the rest is centered, the wider margin above.
        (paper((900, 700), 255, ((100, 300, 660, 480), 0)), (10, 18), (0, 27), {255}),
        (paper((300, 300), 200, ((10, 50, 290, 190), 0), ((90, 90, 210, 150), 100)), (7, 20), (0, 27), {128, 255}),
        (paper((100, 100), 255, ((10, 10, 90, 90), 245), ((40, 30, 60, 70), 0)), (0, 27), (7, 20), {255}),
        # Cut out on a transparent background, the object is light whatever its shade.
        (paper((100, 100), (77, 0), ((20, 0, 80, 100), (20, 255)), mode="LA"), (0, 27), (6, 22), {254}),
        (paper((100, 100), (77, 0), ((20, 0, 80, 100), (235, 255)), mode="LA"), (0, 27), (6, 22), {254}),
        # What lies at the border is not the object, nor is a speck.
        (paper((300, 300), 255, ((0, 0, 300, 40), 90), ((100, 90, 200, 290), 0)), (0, 27), (7, 20), {255}),
        (paper((300, 300), 255, ((5, 5, 15, 15), 0), ((90, 50, 190, 250), 0)), (0, 27), (7, 20), {255}),
        (paper((300, 300), 190, ((90, 50, 190, 250), 255), ((130, 100, 140, 150), 0)), (0, 27), (7, 20), {255}),
        # A half transparent object shows half of the background.
        (paper((28, 28), (0, 255), ((5, 5, 20, 20), (200, 128)), mode="LA"), (5, 19), (5, 19), {100}),
    ],
)
@DOUBTFUL
def test_where_the_object_lies_and_how_light_it_is(tmp_path, picture, rows, columns, shades):
    image = read(tmp_path, picture)
    for axis, (first, last) in ((1, rows), (0, columns)):
        lit = np.flatnonzero(image.any(axis=axis))
        assert (lit[0], lit[-1]) == (first, last)
    assert set(np.unique(image)) - {0} <= shades


@pytest.mark.parametrize(
    ("picture", "doubt"),
    [
        (paper((300, 300), 255, ((100, 0, 200, 200), 0)), "touches the border"),
        (paper((10, 100), 255, ((0, 0, 4, 100), 0)), "touches the border"),
        (paper((300, 300), 255, ((50, 50, 130, 200), 0), ((170, 60, 250, 220), 0)), "is one of several"),
        (paper((300, 300), 255, ((100, 100, 200, 200), 235)), "hardly stands out"),
        # Lines of one pixel lose three quarters of their contrast where the picture is reduced.
        (paper((4000, 4000), 255, ((500, 500, 3500, 3500), 0), ((501, 501, 3499, 3499), 255)), "hardly stands out"),
        (paper((300, 300), 255, ((99, 99, 200, 200), 235), ((0, 0, 95, 95), 235)), "is one of several and hardly"),
    ],
)
def test_doubts_about_the_crop_are_said(tmp_path, picture, doubt):
    with pytest.warns(UserWarning, match=rf"picture\.png may be cropped wrongly: the object {doubt}.*; photograph"):
        assert read(tmp_path, picture).max() >= 254


def test_the_border_s_verdict_and_the_object_s_can_be_overridden(tmp_path):
    opaque = paper((28, 28), 200, ((5, 5, 20, 20), 250))
    cut_out = paper((28, 28), (77, 0), ((5, 5, 20, 20), (235, 255)), mode="LA")
    for given, shades in ((None, {5, 55}), (False, {5, 55}), (True, {200, 250})):
        assert set(np.unique(read(tmp_path, opaque, light_on_dark=given))) == shades
    for given, shades in ((None, {0, 235}), (False, {0, 20})):
        assert set(np.unique(read(tmp_path, cut_out, light_on_dark=given))) == shades


def test_what_cannot_be_read_is_named(tmp_path, shoe, unchecked):
    read(tmp_path, Image.fromarray(shoe), ".jpg")
    path = tmp_path / "picture.jpg"
    edges, longer = struct.pack(">HH", 28, 28), struct.pack(">HH", 2**14, MAX_PIXELS // 2**14 + 1)
    for content, message in (
        (b"", "is not a PNG, JPEG or WebP image; convert it to PNG or JPEG$"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "is not a PNG, JPEG or WebP image; convert it to PNG or JPEG$"),
        (path.read_bytes().replace(edges, longer), f"is too large; save it as a JPEG of at most {MAX_PIXELS:,} pixels"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} {message}"):
            read_image(path)
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        read_image(tmp_path / "no.png")
    with pytest.raises(TypeError, match="light_on_dark must be True, False or None, got 'dark'"):
        read_image(path, light_on_dark="dark")


def test_noise_is_neither_an_object_nor_a_part_of_one(tmp_path):
    rng, picture = np.random.default_rng(0), paper((300, 300), 190, ((100, 50, 200, 250), 110))
    noisy = [grainy(paper((400, 300), 190), noise, rng) for noise in (8, 20)]
    for empty in (*noisy, *(paper((side, side), 130) for side in (1, 28, 100))):
        with pytest.raises(ValueError, match=r"picture\.png shows nothing that is different"):
            read(tmp_path, empty)
    with pytest.warns(UserWarning, match="the object hardly stands out;"):
        image = read(tmp_path, grainy(picture, 30, rng))
    np.testing.assert_array_equal(image > 60, read(tmp_path, picture) > 60)


@pytest.mark.parametrize(("shade", "given", "found"), [(200, True, "lighter"), (252, False, "darker")])
def test_an_object_on_the_wrong_side_of_its_background_is_an_error(tmp_path, shade, given, found):
    picture = paper((100, 100), shade, ((30, 30, 70, 70), 20))
    picture = picture if given else ImageOps.invert(picture)
    with pytest.raises(ValueError, match=f"nothing that is {found} than its background.* light_on_dark={not given}"):
        read(tmp_path, picture, light_on_dark=given)
    np.testing.assert_array_equal(read(tmp_path, picture), read(tmp_path, picture, light_on_dark=not given))


def test_folders_become_a_batch(tmp_path, splits):
    """Whatever the order in which they are made, and whatever else is there."""
    for name, first in (("größe b", 3), ("a", 0)):
        (tmp_path / name).mkdir()
        for i in (2, 0, 1):
            Image.fromarray(splits.test.images[first + i]).save(tmp_path / name / f"{i}.png")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / ".DS_Store").write_text("no picture")
    (tmp_path / "labels.txt").write_text("no folder")
    batch, names = read_folder(tmp_path)
    assert names == ("a", "größe b")
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(batch.images, splits.test.images[:6])
    np.testing.assert_array_equal(read_folder(str(tmp_path), light_on_dark=False)[0].images, 255 - batch.images)


def test_folders_that_cannot_be_read_are_named(tmp_path):
    for name in ("a/0", "b/0"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}/a/0"):
        read_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/empty holds no pictures; add some, or remove the folder"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match=r"a must hold a folder for each of two or more classes, got \['0'\]"):
        read_folder(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"directory is not a directory: .*/c; pass"):
        read_folder(tmp_path / "c")
