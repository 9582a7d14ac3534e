"""Augmentation against slices in NumPy: what is drawn, and how often."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from fashion_jax.augment import shift_and_flip

KEY = jax.random.key(0)


def moved(image, down, right, mirrored):
    padded = np.pad(image[:, ::-1] if mirrored else image, [(2, 2), (2, 2), (0, 0)])
    return padded[2 - down : 30 - down, 2 - right : 22 - right]


def test_each_image_is_moved_and_mirrored_as_a_whole():
    images = np.random.default_rng(0).integers(1, 256, (600, 28, 20, 3), dtype=np.uint8)
    ways, drawn = list(itertools.product(range(-2, 3), range(-2, 3), (False, True))), set()
    for before, after in zip(images, np.asarray(jax.jit(shift_and_flip)(KEY, images)), strict=True):
        fitting = [way for way in ways if np.array_equal(moved(before, *way), after)]
        assert len(fitting) == 1
        drawn.update(fitting)
    assert len(drawn) == len(ways)


def test_all_offsets_and_both_sides_are_equally_likely():
    images = jnp.zeros((20_000, 28, 28), jnp.uint8).at[:, 10, 10].set(255)
    at = np.argwhere(np.asarray(shift_and_flip(KEY, images, pixels=1)))[:, 1:]
    cells, counts = np.unique(at, axis=0, return_counts=True)
    assert cells[:, 0].tolist() == [9] * 6 + [10] * 6 + [11] * 6
    # Six standard deviations of a fraction of 1/18.
    np.testing.assert_allclose(counts / 20_000, 1 / 18, atol=6 * np.sqrt(1 / 18 * 17 / 18 / 20_000))
