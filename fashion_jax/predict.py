"""Classify images with a trained network: arrays, image files, and how sure the network is.

Images pass through one compiled program in chunks of one size, so that no number of images compiles a second one.
"""

import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Key, UInt8
from scipy.special import entr

from fashion_jax.config import TrainConfig, check_config, check_count
from fashion_jax.data import check_key, check_pixels
from fashion_jax.model import Params, build_model, check_params, check_rate

# Images in a chunk. On two cores chunks of 2,000 take 10,000 images in two thirds of the time, and need thirty times as
# long for one.
CHUNK = 32
# On a GPU, where what counts is how many there are: an H200 took 0.27 ms for 32 images, and by PyTorch 0.32 for 1,000.
LARGE_CHUNK = 1_024
# Thinned networks that pass over a chunk at the same time.
LANES = 16
SIDE = 28
FORMATS = ("PNG", "JPEG", "WEBP")
# A file of a few kB can ask for more memory than there is; this is more than cameras make.
MAX_PIXELS = 2**27
# How far from the background a pixel is part of the object: 5% of the range, as in Fashion-MNIST's own conversion.
CLOSE = 0.05 * 255


class MCPrediction(NamedTuple):
    """What many thinned networks say of n images, in float64.

    Attributes:
        probabilities: Mean over the samples.
        spread: Standard deviation over the samples.
        entropy: Entropy of the mean probabilities, in nats, 0 to ln 10: how unsure the prediction is in all.
        mutual_information: Between the class and the choice of the thinned network, in nats: the part of the entropy
            that comes from the samples' disagreement, and not from each of them being unsure. At least 0.
    """

    probabilities: Float64[np.ndarray, "n classes"]
    spread: Float64[np.ndarray, "n classes"]
    entropy: Float64[np.ndarray, " n"]
    mutual_information: Float64[np.ndarray, " n"]


def predict(
    params: Params,
    images: UInt8[Array | np.ndarray, "n height width *channels"],
    *,
    config: TrainConfig = TrainConfig(),
) -> Float[np.ndarray, "n classes"]:
    """Compute the probability of each class, dropout off.

    Args:
        params: The model's parameters, such as `Run.state.params`.
        images: Grey pixels, 0 to 255, light objects on black; any number of images, none included.
        config: Gives the widths.

    Returns:
        One row an image. An image's row depends on the other images by rounding at most.

    Raises:
        TypeError: The images are not `uint8`.
        ValueError: The images' shape is wrong, or the parameters do not fit the config.

    >>> from fashion_jax.train import init_state
    >>> params = init_state(jax.random.key(0)).params
    >>> predict(params, np.zeros((3, 28, 28), np.uint8)).shape
    (3, 10)
    """
    images = _check_images(images, config)
    check_params(params, config)
    rows = [probabilities(params, chunk, config=config) for chunk, _ in _chunks(images)]
    rows = [np.zeros((0, config.classes), jnp.result_type(float)), *jax.device_get(rows)]
    return np.concatenate(rows)[: len(images)]


def predict_mc(
    params: Params,
    images: UInt8[Array | np.ndarray, "n height width *channels"],
    *,
    key: Key[Array, ""],
    samples: int,
    dropout_rate: float,
    config: TrainConfig = TrainConfig(),
) -> MCPrediction:
    """Predict with dropout on, many times over: Monte Carlo dropout.

    Each sample is one thinned network that sees all images, so what is said of an image does not depend on which others
    come with it. Samples are lanes of a `vmap`; memory does not grow with their number or with that of the images.
    Neither of the two, nor the rate, is part of the compiled program.

    Args:
        params: The model's parameters.
        images: Grey pixels, 0 to 255.
        key: Decides which hidden units each sample drops.
        samples: How many thinned networks, at least 1.
        dropout_rate: Share of hidden units to drop, in [0, 1): the rate that the network was trained with.
        config: Gives the widths.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument is out of range or has the wrong shape.

    Source: Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016; the mutual information is that of
    Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning", 2011, arXiv:1112.5745.

    >>> from fashion_jax.train import init_state
    >>> params = init_state(jax.random.key(0)).params
    >>> images = np.zeros((3, 28, 28), np.uint8)
    >>> sure = predict_mc(params, images, key=jax.random.key(1), samples=20, dropout_rate=0.2)
    >>> bool((sure.mutual_information > 0).all() and (sure.mutual_information < sure.entropy).all())
    True
    """
    check_key(key)
    samples = check_count("samples", samples, 1)
    check_rate(dropout_rate)
    images = _check_images(images, config)
    check_params(params, config)

    total, squares = np.zeros((2, len(images), config.classes))
    entropies = np.zeros(len(images))
    for chunk, rows in _chunks(images):
        n = rows.stop - rows.start
        for first in range(0, samples, LANES):
            lanes = _sampled_probabilities(params, chunk, key, first, dropout_rate, config=config)
            drawn = np.asarray(lanes, np.float64)[: samples - first, :n]
            total[rows] += drawn.sum(axis=0)
            squares[rows] += np.square(drawn).sum(axis=0)
            entropies[rows] += entr(drawn).sum(axis=(0, 2))
    mean = total / samples
    entropy = entr(mean).sum(axis=1)
    # Both differences are at least 0, but for rounding.
    variance = np.maximum(squares / samples - np.square(mean), 0)
    return MCPrediction(mean, np.sqrt(variance), entropy, np.maximum(entropy - entropies / samples, 0))


@functools.partial(jax.jit, static_argnames="config")
def probabilities(
    params: Params, images: UInt8[Array, "n height width *channels"], *, config: TrainConfig
) -> Float[Array, "n classes"]:
    """Compute the probability of each class for one chunk: what `predict` runs, and what is exported.

    Args:
        params: The model's parameters.
        images: n images at once; every other n is a compilation of its own.
        config: Gives the widths; static.

    >>> from fashion_jax.train import init_state
    >>> params = init_state(jax.random.key(0)).params
    >>> rows = probabilities(params, jnp.zeros((2, 28, 28), jnp.uint8), config=TrainConfig())
    >>> [f"{total:.4f}" for total in rows.sum(axis=1)]
    ['1.0000', '1.0000']
    """
    log_probs = build_model(config).apply({"params": params}, images, deterministic=True)
    return jnp.exp(cast(Array, log_probs))


def read_image(path: str | os.PathLike[str], *, light_on_dark: bool | None = None) -> UInt8[np.ndarray, "28 28"]:
    """Read an image file as one of the data set's images: grey, 28x28, a light object on black.

    It takes a picture of one object on a plain background: it turns the picture as its EXIF data say, makes it grey,
    negates it if the object is darker than the background, moves the background's level to 0, trims what is within 5%
    of the background, scales the longest edge to 28 and centres the rest. A picture of 28x28 pixels is made grey and
    negated if need be, and else taken as it is, because the data set's own images have been through all that.

    Fashion-MNIST's authors scaled by leaving pixels out and sharpened afterwards. Here a pixel is the mean of what it
    covers, and nothing is sharpened.

    Args:
        path: A PNG, JPEG or WebP file of any mode; of an animation, the first picture.
        light_on_dark: Whether the object is lighter than its background. If left out, the border decides: a background
            that is lighter than mid-grey is taken for paper. Where the border is transparent, the object decides.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not an image, is damaged or too large, or shows one shade only, or nothing lighter (or
            darker, as `light_on_dark` says) than its background.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017, arXiv:1708.07747, section 2.

    >>> import tempfile
    >>> from PIL import Image
    >>> path = Path(tempfile.mkdtemp()) / "photograph.png"
    >>> paper = Image.new("RGB", (600, 900), "white")
    >>> paper.paste("navy", (200, 100, 400, 500))
    >>> paper.save(path)
    >>> image = read_image(path)
    >>> np.flatnonzero(image.any(axis=0)).tolist() == list(range(7, 21)), image[:, 0].tolist() == [0] * 28
    (True, True)
    """
    grey, alpha = _decode(Path(path))
    grey, alpha = grey.astype(np.float32), alpha.astype(np.float32) / 255
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
    as_it_is = grey.shape == (SIDE, SIDE)
    if grey.max() - (grey.min() if as_it_is else background) <= CLOSE:
        found, other = ("lighter", "dark") if light_on_dark else ("darker", "light")
        raise ValueError(
            f"{path} shows one shade only, or nothing that is {found} than its background; in the second case, try "
            f"light_on_dark={not light_on_dark} (--objects {other})"
        )
    if as_it_is:
        return np.rint(grey).astype(np.uint8)
    return _fit_into_square(_trim(grey, background), background)


def _check_images(images, config):
    check_config(config)
    check_pixels(images, "images")
    if images.shape[1:] != config.image_shape:
        expected = ", ".join(map(str, ("n", *config.image_shape)))
        raise ValueError(f"images must have shape [{expected}] for this config, got {list(images.shape)}")
    return images


def _chunks(images) -> Iterator[tuple[Array | np.ndarray, slice]]:
    """Give chunks of one size, the last filled up with black, and the rows that each covers."""
    size = CHUNK if jax.default_backend() == "cpu" else LARGE_CHUNK
    for start in range(0, len(images), size):
        rows = slice(start, min(start + size, len(images)))
        chunk = images[rows]
        if len(chunk) < size:
            chunk = np.pad(np.asarray(chunk), [(0, size - len(chunk))] + [(0, 0)] * (chunk.ndim - 1))
        yield chunk, rows


@functools.partial(jax.jit, static_argnames="config")
def _sampled_probabilities(params, images, key, first, dropout_rate, *, config) -> Float[Array, "lanes n classes"]:
    model = build_model(config, dropout_rate)

    def sample(number):
        sample_key = jax.random.fold_in(key, number)

        def one(image):
            # All images see this sample's key, so that they pass through the same thinned network.
            rngs = {"dropout": sample_key}
            return model.apply({"params": params}, image[None], deterministic=False, rngs=rngs)[0]

        return jnp.exp(jax.vmap(one)(images))

    return jax.vmap(sample)(first + jnp.arange(LANES))


def _decode(path: Path) -> tuple[UInt8[np.ndarray, "height width"], UInt8[np.ndarray, "height width"]]:
    """Read the grey levels and the opacity of a picture, turned as it is meant to be seen."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty; expected a PNG, JPEG or WebP image")
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        size = picture.size
        if 0 < size[0] * size[1] <= MAX_PIXELS:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):
                # Pillow cuts off what is above 255 instead of scaling, and does not look at the transparent level.
                levels = np.asarray(picture)
                opaque = levels != picture.info.get("transparency", -1)
                return (levels.clip(0, 65535) // 257).astype(np.uint8), opaque * np.uint8(255)
            alpha = np.asarray(picture.convert("RGBA").getchannel("A")) if picture.has_transparency_data else None
            grey = np.asarray(picture.convert("RGB").convert("L"))
            return grey, np.full_like(grey, 255) if alpha is None else alpha
    except bombs as error:
        raise ValueError(f"{path} is too large, at most {MAX_PIXELS:,} pixels are read: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG, JPEG or WebP image") from None
    except Exception as error:
        # Damaged files make Pillow's decoders raise whatever comes to hand: SyntaxError, struct.error, IndexError.
        raise ValueError(f"{path} is damaged, it cannot be read as an image: {error}") from error
    if 0 in size:
        raise ValueError(f"{path} has no pixels: its size is {size[0]}x{size[1]}")
    raise ValueError(f"{path} is too large: {size[0]}x{size[1]} pixels, at most {MAX_PIXELS:,} pixels are read")


def _border(pixels):
    return np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])


def _trim(grey, background: float):
    """Cut off the rows and columns at the edges that are as good as the background."""
    apart = np.abs(grey - background) > CLOSE
    rows, columns = np.flatnonzero(apart.any(axis=1)), np.flatnonzero(apart.any(axis=0))
    return grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _fit_into_square(grey, background: float) -> UInt8[np.ndarray, "28 28"]:
    """Scale the longest edge to 28, move the background's level to 0 and centre on black."""
    from PIL import Image

    scale = SIDE / max(grey.shape)
    height, width = (max(1, round(edge * scale)) for edge in grey.shape)
    picture = Image.fromarray(np.asarray(grey, np.float32))
    grey = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    grey = ((grey - background) * (255 / (255 - background))).clip(0, 255)
    # Where the margin is odd, the wider side is above and on the left, as in most of the data set's images.
    top, left = (SIDE - height + 1) // 2, (SIDE - width + 1) // 2
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + height, left : left + width] = np.rint(grey)
    return image
