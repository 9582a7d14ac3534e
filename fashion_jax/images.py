"""Pictures in the data set's form, one by one or in folders: gray, 28x28, a light object on black."""

import contextlib
import io
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from fashion_jax import _checks
from fashion_jax.types import Batch

SIDE = 28
# A file of a few kB can expand to more than the memory; phones take photographs of 200 megapixels.
MAX_PIXELS = 2**28
LONGEST = 1024  # Larger pictures are reduced as they are decoded.
MARGIN = 0.05  # The share of the edges in which most of what one sees is background.
# A pixel belongs to the object if it differs from the background by 5% of the range, as in Fashion-MNIST's conversion.
CLOSE = 0.05 * 255
# Smaller pieces are specks: as a share of the picture's area, and of the main piece's mass.
LEAST_AREA, LEAST_MASS = 1e-4, 0.03
RIVAL = 0.3  # A piece of more than this share of the main piece's mass is another object.
PEAK = 254  # Every image of the data set reaches 254 or 255.

Pixels = Float[np.ndarray, "_ _"]


def read_image(path: str | os.PathLike[str], *, light_on_dark: bool | None = None) -> UInt8[np.ndarray, "28 28"]:
    """Read a picture of one object on a plain background as an image of the data set.

    The picture is rotated as its EXIF data say, made gray, inverted if the object is darker than the background, and
    cropped to the object; uneven light, noise and specks do not belong to it. The background becomes 0, the brightest
    pixel at least 254, the longest edge 28 pixels, and the object is centered; a pixel is the mean of the area that it
    covers, where Fashion-MNIST subsampled and sharpened. A picture of 28x28 pixels is only made gray and inverted.

    Args:
        path: A PNG, JPEG or WebP file of any mode; of an animation, the first frame.
        light_on_dark: Whether the object is lighter than its background. By default it is whatever stands out most; on
            a transparent background the object's own shade decides, in a picture of 28x28 pixels the border's.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: `light_on_dark` is not True, False or None.
        ValueError: The file is not an image, is damaged or too large, or shows nothing lighter (or darker, as
            `light_on_dark` says) than its background.

    Warns:
        UserWarning: The object touches the border, is one of several, or hardly stands out.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST", arXiv:1708.07747, 2017, section 2.

    >>> import tempfile
    >>> from PIL import Image
    >>> path = Path(tempfile.mkdtemp()) / "photograph.png"
    >>> paper = Image.new("RGB", (600, 900), "white")
    >>> paper.paste("navy", (200, 100, 400, 500))
    >>> paper.save(path)
    >>> image = read_image(path)
    >>> np.flatnonzero(image.any(axis=0)).tolist() == list(range(7, 21)), image[:, 0].any()
    (True, np.False_)
    """
    path = _checks.path("path", path)
    if not isinstance(light_on_dark, bool | np.bool_ | None):
        raise TypeError(f"light_on_dark must be True, False or None, got {_checks.got(light_on_dark)}")
    ink, alpha = _decode(path)
    level, opacity = (float(np.median(part[_frame(part)])) for part in (ink, alpha))
    if cut_out := opacity < 0.5:
        light_on_dark = bool(ink.sum() > 127.5 * alpha.sum()) if light_on_dark is None else light_on_dark
        level = 0.0 if light_on_dark else 255.0
    grey = ink + level * (1 - alpha)
    if grey.shape == (SIDE, SIDE):
        image = grey if light_on_dark or (light_on_dark is None and level < 127.5) else 255 - grey
        image = image if np.ptp(image) > CLOSE else None
    else:
        image = _read_photograph(path, grey, np.full_like(grey, level) if cut_out else None, light_on_dark)
    if image is None:
        kind = {None: "different from", True: "lighter than", False: "darker than"}[light_on_dark]
        hint = "" if light_on_dark is None else f"; if there is an object, try light_on_dark={not light_on_dark}"
        raise ValueError(f"{path} shows nothing that is {kind} its background{hint}")
    return np.rint(image).astype(np.uint8)


def read_folder(
    directory: str | os.PathLike[str], *, light_on_dark: bool | None = None
) -> tuple[Batch, tuple[str, ...]]:
    """Read a directory with one folder of pictures for each class, each picture as `read_image` does.

    Names that begin with a dot are left out, and so are files beside the folders. A terminal shows the progress.

    Args:
        directory: Its folders are the classes.
        light_on_dark: As for `read_image`.

    Returns:
        Images [n, 28, 28] and their labels, in the order of folders and files, and the names of the folders, sorted:
        label 0 is the first.

    Raises:
        OSError: There is no such directory, or a file cannot be read.
        TypeError: `light_on_dark` is not True, False or None.
        ValueError: There are fewer than two folders, one is empty, or `read_image` does not accept a file.

    Warns:
        UserWarning: As for `read_image`.

    >>> import tempfile
    >>> from PIL import Image
    >>> directory = Path(tempfile.mkdtemp())
    >>> for name, width in (("hat", 300), ("belt", 100)):
    ...     paper = Image.new("L", (600, 600), "white")
    ...     paper.paste("black", (200, 200, 200 + width, 300))
    ...     (directory / name).mkdir()
    ...     paper.save(directory / name / "1.png")
    >>> batch, class_names = read_folder(directory)
    >>> batch, batch.labels.tolist(), class_names
    (Batch(images=uint8[2, 28, 28], labels=int32[2]), [0, 1], ('belt', 'hat'))
    """
    from tqdm.auto import tqdm

    directory = _checks.path("directory", directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"directory is not a directory: {directory}; pass one with a folder of pictures for each class"
        )
    pictures = {folder.name: sorted(_visible(folder)) for folder in sorted(_visible(directory)) if folder.is_dir()}
    if len(pictures) < 2:
        raise ValueError(f"{directory} must hold a folder for each of two or more classes, got {list(pictures)}")
    for name, paths in pictures.items():
        if not paths:
            raise ValueError(f"{directory / name} holds no pictures; add some, or remove the folder")
    files = [(path, label) for label, paths in enumerate(pictures.values()) for path in paths]
    images = [
        read_image(path, light_on_dark=light_on_dark)
        for path, _ in tqdm(files, desc=f"reading {directory}", unit="picture", delay=1, disable=None)
    ]
    return Batch(np.stack(images), np.array([label for _, label in files], np.int32)), tuple(pictures)


def _visible(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if not path.name.startswith(".")]


def _read_photograph(path: Path, grey: Pixels, known: Pixels | None, light_on_dark: bool | None) -> Pixels | None:
    """Return the object in shades from 0 to 255, or None; a background that is not known is estimated."""
    from scipy import ndimage

    smooth = ndimage.median_filter(grey, 3)
    # The fit sees no pixels that nothing around them resembles.
    background = _background(np.where(abs(grey - smooth) > 64, smooth, grey)) if known is None else known
    signs = (1, -1) if light_on_dark is None else (1 if light_on_dark else -1,)
    found = [(sign, *_find(sign * (grey - background), sign * (smooth - background))) for sign in signs]
    sign, weight, box, doubts = max(found, key=lambda piece: piece[1])
    if not weight:
        return None
    most = 255 - background if sign == 1 else background
    contrast, most = (_resize(part[box], SIDE) for part in (sign * (grey - background), most))
    noise = _std((grey - background)[_frame(grey, MARGIN)])
    doubts["hardly stands out"] = bool(contrast.max() < max(2 * CLOSE, 4 * noise))
    doubts["touches the border"] &= known is None
    if any(doubts.values()):
        warnings.warn(
            f"{path} may be cropped wrongly: the object {' and '.join(doubt for doubt in doubts if doubts[doubt])}; "
            "photograph it alone and whole, in even light, on a plain background of another shade",
            stacklevel=3,
        )
    shade = (contrast / most.clip(1)).clip(1e-6, 1)
    shade *= max(255, PEAK / shade.max())
    # The wider margin is above and on the left, as in most of the data set's images.
    return np.pad(shade, [((SIDE - edge + 1) // 2, (SIDE - edge) // 2) for edge in shade.shape])


def _decode(path: Path) -> tuple[Pixels, Pixels]:
    """Return gray levels from 0 to 255, multiplied by the opacity, and the opacity from 0 to 1."""
    from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    content = path.read_bytes()
    # The plugins themselves, because `Image.open` warns of an attack at 90 megapixels.
    starts = [content.startswith(b"\x89PNG"), content.startswith(b"\xff\xd8"), content[8:12] == b"WEBP"]
    plugins: Any = [PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile, WebPImagePlugin.WebPImageFile]
    if not any(starts):
        raise ValueError(f"{path} is not a PNG, JPEG or WebP image; convert it to PNG or JPEG")
    try:
        with warnings.catch_warnings(action="ignore"):  # Of odd metadata.
            picture = plugins[starts.index(True)](io.BytesIO(content))
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            deep = any(str(tile[3]).endswith("16B") for tile in picture.tile)
            factor = math.ceil(max(picture.size) / LONGEST)
            picture.draft(None, (max(picture.width // factor, 1), max(picture.height // factor, 1)))
            picture.load()
            ink, alpha = _upright(picture, _reduce(picture))
    except Image.DecompressionBombError:
        raise ValueError(f"{path} is too large; save it as a JPEG of at most {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Damaged files make Pillow's decoders raise SyntaxError, struct.error and others.
        raise ValueError(f"{path} is damaged: {error}") from error
    if deep:  # Of 8, 10 or 12 bits stored in 16.
        ink *= next((255 / top for top in (255 / 257, 1023 / 257, 4095 / 257) if ink.max() < top + 0.01), 1)
    return ink, alpha


def _reduce(picture: Any) -> Float[np.ndarray, "2 height width"]:
    """Return ink and opacity, each the mean of a block of pixels; in bands, as floats of a whole picture are large."""
    from PIL import Image

    factor, bands = math.ceil(max(picture.size) / LONGEST), []
    for top in range(0, picture.height, 16 * factor):
        band, alpha = picture.crop((0, top, picture.width, min(top + 16 * factor, picture.height))), 1
        if picture.mode.startswith("I"):
            # Pillow clips 16 bits at 255 instead of scaling them, and ignores their transparent level.
            grey, alpha = np.asarray(band) / 257, np.asarray(band) != picture.info.get("transparency", -1)
        elif picture.has_transparency_data:
            band = band.convert("RGBA")
            grey, alpha = np.asarray(band.convert("RGB").convert("L")), np.asarray(band.getchannel("A")) / 255
        else:
            grey = np.asarray(band.convert("RGB").convert("L"))
        parts = (np.float32(grey * alpha), np.float32(alpha + 0 * grey))
        bands.append([np.asarray(Image.fromarray(part).reduce(factor)) for part in parts])
    return np.concatenate(bands, axis=1)


def _upright(picture: Any, pixels: Float[np.ndarray, "2 h w"]) -> Float[np.ndarray, "2 _ _"]:
    """Rotate pixels as the picture's EXIF data say, whatever else is wrong with these."""
    orientation = 1
    with contextlib.suppress(Exception):
        orientation = picture.getexif().get(0x0112)
    pixels = pixels.swapaxes(1, 2) if orientation in (5, 6, 7, 8) else pixels
    pixels = pixels[:, ::-1] if orientation in (3, 4, 7, 8) else pixels
    return pixels[:, :, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _background(grey: Pixels) -> Pixels:
    """Fit a polynomial to what lies around the object, of degree 1, 2, 4 and 6 in turn."""
    # First to the margin and then to all that is near it, so that the object drops out. Blocks have less noise.
    blocks = _resize(grey, min(max(grey.shape), 100)).astype(float)
    centers = [(2 * np.arange(edge) + 1) / edge - 1 for edge in (*blocks.shape, *grey.shape)]
    y, x, y_all, x_all = (np.polynomial.legendre.legvander(center, 6) for center in centers)
    i, j = np.array(sorted(((i, j) for i in range(7) for j in range(7 - i)), key=sum)).T
    terms, margin = y[:, None, i] * x[None, :, j], _frame(blocks, MARGIN)
    surface, weights = np.full(blocks.shape, np.median(blocks[margin])), np.zeros(1)
    rounds = 4 * [(3, margin)] + 3 * [(6, margin)] + [(count, True) for count in (6, 6, 6, 15, 15, 15, 28, 28, 28)]
    for number, (count, where) in enumerate(rounds, 1):
        distance = np.abs(blocks - surface)
        near = where & (distance <= max(CLOSE / number, 3 * _std(distance[margin])))
        weights = np.linalg.lstsq(terms[near][:, :count], blocks[near])[0]
        surface = terms[:, :, :count] @ weights
    return (y_all[:, i] * weights @ x_all[:, j].T).astype(np.float32)


def _find(contrast: Pixels, smooth: Pixels) -> tuple[float, tuple[slice, ...], dict[str, bool]]:
    """Return the weight of the main piece that stands out, the box around the object, and doubts about it."""
    from scipy import ndimage

    margin = _frame(contrast, MARGIN)
    # Smoothing finds faint parts in noise, and loses thin lines.
    mask = contrast > max(CLOSE, 6 * _std(contrast[margin]))
    mask |= smooth > max(CLOSE, 4 * _std(smooth[margin]))
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3)), output=labels)
    mass = np.bincount(labels.ravel(), contrast.ravel())
    mass[np.bincount(labels.ravel()) < LEAST_AREA * mask.size] = mass[0] = 0
    # What is at the border may be the table on which the paper lies.
    touches = np.isin(range(len(mass)), labels[_frame(labels)])
    weight = mass * np.where(touches, RIVAL, 1)
    main = weight.argmax()
    kept = np.isin(labels, np.flatnonzero((mass >= LEAST_MASS * mass[main]) & (touches <= touches[main]) & (mass > 0)))
    several = np.sum(mass > RIVAL * mass[main]) > 1
    doubts = {"touches the border": bool(touches[main]), "is one of several": bool(several)}
    return weight[main], (ndimage.find_objects(kept.astype(int)) or [()])[0], doubts


def _resize(pixels: Pixels, longest: int) -> Pixels:
    from PIL import Image

    height, width = (max(1, round(edge * longest / max(pixels.shape))) for edge in pixels.shape)
    return np.asarray(Image.fromarray(np.float32(pixels)).resize((width, height), Image.Resampling.BOX))


def _std(values: np.ndarray) -> float:
    """Return the std of normal values around 0, whatever the outliers."""
    return 1.4826 * float(np.median(np.abs(values)))


def _frame(pixels: np.ndarray, share: float = 0) -> np.ndarray:
    frame = np.ones(pixels.shape, bool)
    height, width = (max(int(edge * share), 1) for edge in pixels.shape)
    frame[height:-height, width:-width] = False
    return frame
