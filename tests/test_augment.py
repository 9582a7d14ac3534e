"""Augmentation against slices in NumPy: what is drawn, and how often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fashion_jax.augment import flip, shift, shift_and_flip

KEY = jax.random.key(0)


def moved(image, down, right, mirrored):
    padded = np.pad(image[:, ::-1] if mirrored else image, [(2, 2), (2, 2), (0, 0)])
    return padded[2 - down : 30 - down, 2 - right : 22 - right]


@pytest.mark.parametrize(
    ("augment", "steps", "sides"),
    [
        (functools.partial(shift, pixels=2), range(-2, 3), (False,)),
        (flip, (0,), (False, True)),
        (shift_and_flip, range(-2, 3), (False, True)),
    ],
)
def test_each_image_is_moved_and_mirrored_as_a_whole(augment, steps, sides):
    images = np.random.default_rng(0).integers(1, 256, (600, 28, 20, 3), dtype=np.uint8)
    ways = [(down, right, mirrored) for down in steps for right in steps for mirrored in sides]
    drawn = set()
    for before, after in zip(images, np.asarray(jax.jit(augment)(KEY, images)), strict=True):
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
