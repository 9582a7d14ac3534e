"""Pictures of clothes as the network knows them: grey, 28x28, a light object on black."""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from fashion_jax import _checks

SIDE = 28
FORMATS = ("PNG", "JPEG", "WEBP")
# A file of a few kB can expand to more than the memory; no camera takes larger pictures.
MAX_PIXELS = 2**27
# A pixel belongs to the object if it differs from the background by 5% of the range, as in Fashion-MNIST's conversion.
CLOSE = 0.05 * 255


def read_image(path: str | os.PathLike[str], *, light_on_dark: bool | None = None) -> UInt8[np.ndarray, "28 28"]:
    """Read a picture of one object on a plain background as an image of the data set.

    The picture is rotated as its EXIF data say, made grey, inverted if the object is darker than the background, and
    cropped to the object; the background becomes 0, the longest edge 28 pixels, and the object is centered. A picture
    of 28x28 pixels is only made grey and inverted. Fashion-MNIST itself was subsampled and sharpened; here a pixel is
    the mean of the area that it covers.

    Args:
        path: A PNG, JPEG or WebP file of any mode; of an animation, the first frame.
        light_on_dark: Whether the object is lighter than its background. By default a background lighter than mid-grey
            means a dark object; if the background is transparent, the object's own shade decides.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not an image, is damaged or too large, or shows nothing lighter (or darker, as
            `light_on_dark` says) than its background.

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
    grey, alpha = _decode(path)
    background = float(np.median(_border(grey)))
    if np.median(_border(alpha)) < 0.5:
        if light_on_dark is None:
            light_on_dark = bool((grey * alpha).sum() > 127.5 * alpha.sum())
        background = 0.0 if light_on_dark else 255.0
    elif light_on_dark is None:
        light_on_dark = background < 127.5
    grey = grey * alpha + background * (1 - alpha)
    if not light_on_dark:
        grey, background = 255 - grey, 255 - background
    sized = grey.shape == (SIDE, SIDE)
    if grey.max() - (grey.min() if sized else background) <= CLOSE:
        found = "lighter" if light_on_dark else "darker"
        raise ValueError(
            f"{path} shows nothing that is {found} than its background; if there is an object, try "
            f"light_on_dark={not light_on_dark}"
        )
    return np.rint(grey).astype(np.uint8) if sized else _fit_into_square(_crop(grey, background), background)


def _decode(path: Path) -> tuple[Float[np.ndarray, "height width"], Float[np.ndarray, "height width"]]:
    """Return grey levels from 0 to 255 and opacity from 0 to 1."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    content = path.read_bytes()
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            # Pillow clips 16 bits at 255 instead of scaling them, and ignores their transparent level.
            levels = np.asarray(picture)
            grey, alpha = levels.clip(0, 65535) // 257, 255 * (levels != picture.info.get("transparency", -1))
        else:
            grey, alpha = np.asarray(picture.convert("RGB").convert("L")), np.uint8(255)
            if picture.has_transparency_data:
                alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG, JPEG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path} is too large: at most {MAX_PIXELS:,} pixels are read") from None
    except Exception as error:  # Damaged files make Pillow's decoders raise SyntaxError, struct.error and others.
        raise ValueError(f"{path} is damaged: {error}") from error
    return grey.astype(np.float32), np.broadcast_to(np.float32(alpha) / 255, grey.shape)


def _border(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])


def _crop(grey: np.ndarray, background: float) -> np.ndarray:
    object_ = np.abs(grey - background) > CLOSE
    rows, columns = np.flatnonzero(object_.any(axis=1)), np.flatnonzero(object_.any(axis=0))
    return grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _fit_into_square(grey: np.ndarray, background: float) -> UInt8[np.ndarray, "28 28"]:
    """Scale the longest edge to 28, shift the background to 0 and center on black."""
    from PIL import Image

    scale = SIDE / max(grey.shape)
    height, width = (max(1, round(edge * scale)) for edge in grey.shape)
    grey = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BOX))
    grey = ((grey - background) * (255 / (255 - background))).clip(0, 255)
    # The wider margin is above and on the left, as in most of the data set's images.
    top, left = (SIDE - height + 1) // 2, (SIDE - width + 1) // 2
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + height, left : left + width] = np.rint(grey)
    return image
