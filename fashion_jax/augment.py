"""Augmentation: functions of a key and images, applied to each training batch on the device.

They compose, as in `TrainConfig(augment=functools.partial(shift_and_flip, pixels=1))`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt8


def shift(
    key: Key[Array, ""], images: UInt8[Array, "n height width *channels"], *, pixels: int
) -> UInt8[Array, "n height width *channels"]:
    """Move each image by -pixels to pixels down and right, uniformly at random; uncovered pixels are 0.

    >>> images = jnp.zeros((5, 28, 28), jnp.uint8).at[:, 14, 14].set(255)
    >>> at = jnp.argwhere(shift(jax.random.key(0), images, pixels=2) == 255)[:, 1:]
    >>> at.shape, int(at.min()) >= 12, int(at.max()) <= 16
    ((5, 2), True, True)
    """
    margin = (pixels, pixels)
    padded = jnp.pad(images, [(0, 0), margin, margin] + [(0, 0)] * (images.ndim - 3))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def crop(image, corner):
        start = (*corner, *[0] * (image.ndim - 2))
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def flip(
    key: Key[Array, ""], images: UInt8[Array, "n height width *channels"]
) -> UInt8[Array, "n height width *channels"]:
    """Mirror each image left to right with probability 1/2."""
    flipped = jax.random.bernoulli(key, shape=(len(images), *[1] * (images.ndim - 1)))
    return jnp.where(flipped, images[:, :, ::-1], images)


def shift_and_flip(
    key: Key[Array, ""], images: UInt8[Array, "n height width *channels"], *, pixels: int = 2
) -> UInt8[Array, "n height width *channels"]:
    """Move and mirror each image at random, as `shift` and `flip` do."""
    shift_key, flip_key = jax.random.split(key)
    return shift(shift_key, flip(flip_key, images), pixels=pixels)
