"""Augmentation: training images as they are drawn anew at every step, on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt8

from fashion_jax.config import TrainConfig


def augment(
    images: UInt8[Array, "n height width *channels"], key: Key[Array, ""], config: TrainConfig
) -> UInt8[Array, "n height width *channels"]:
    """Move and mirror each image at random, as the config says; return them as they are if it says neither.

    Args:
        images: A batch.
        key: This step's key.
        config: `shift` and `flip`.

    Returns:
        Images of the same shape; what a moved image leaves free is black.

    >>> images = jnp.zeros((5, 28, 28), jnp.uint8).at[:, 14, 14].set(255)
    >>> moved = augment(images, jax.random.key(0), TrainConfig(shift=2))
    >>> at = jnp.argwhere(moved == 255)[:, 1:]
    >>> at.shape, int(at.min()) >= 12, int(at.max()) <= 16
    ((5, 2), True, True)
    """
    if not config.shift and not config.flip:
        return images
    n, height, width, *_ = images.shape
    # The step's key itself draws the dropout masks.
    shift_key, flip_key = jax.random.split(jax.random.fold_in(key, 1))
    rows = jnp.broadcast_to(jnp.arange(height), (n, height))
    columns = jnp.broadcast_to(jnp.arange(width), (n, width))
    if config.flip:
        columns = jnp.where(jax.random.bernoulli(flip_key, shape=(n, 1)), columns[:, ::-1], columns)
    if config.shift:
        shifts = jax.random.randint(shift_key, (2, n, 1), 0, 2 * config.shift + 1)
        rows, columns = rows + shifts[0], columns + shifts[1]
        margin = (config.shift, config.shift)
        images = jnp.pad(images, [(0, 0), margin, margin] + [(0, 0)] * (images.ndim - 3))
    return images[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
