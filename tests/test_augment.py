import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fashion_jax import TrainConfig, fit
from fashion_jax.augment import augment

KEY = jax.random.key(0)


def moved(image, down, right):
    """Move an image by slices, black coming in."""
    height, width = image.shape[:2]
    result = np.zeros_like(image)
    rows, columns = (slice(max(by, 0), size + min(by, 0)) for by, size in ((down, height), (right, width)))
    from_rows, from_columns = (slice(max(-by, 0), size - max(by, 0)) for by, size in ((down, height), (right, width)))
    result[rows, columns] = image[from_rows, from_columns]
    return result


@pytest.mark.parametrize("channels", [(), (3,)])
def test_each_image_is_moved_and_mirrored_as_a_whole(channels):
    images = np.random.default_rng(0).integers(1, 256, (300, 28, 20, *channels), dtype=np.uint8)
    config = TrainConfig(shift=2, flip=True, image_shape=(28, 20, *channels))
    result = np.asarray(augment(jnp.array(images), KEY, config))
    drawn = set()
    for before, after in zip(images, result, strict=True):
        fitting = [
            (down, right, mirrored)
            for down in range(-2, 3)
            for right in range(-2, 3)
            for mirrored in (False, True)
            if np.array_equal(moved(before[:, ::-1] if mirrored else before, down, right), after)
        ]
        assert len(fitting) == 1
        drawn.update(fitting)
    assert len(drawn) == 5 * 5 * 2


def test_all_offsets_and_both_sides_are_as_likely():
    images = jnp.zeros((20_000, 28, 28), jnp.uint8).at[:, 10, 10].set(255)
    at = np.argwhere(np.asarray(augment(images, KEY, TrainConfig(shift=1, flip=True))))[:, 1:]
    cells, counts = np.unique(at, axis=0, return_counts=True)
    assert cells[:, 0].tolist() == [9] * 6 + [10] * 6 + [11] * 6
    # Six standard deviations of a share of 1/18.
    np.testing.assert_allclose(counts / 20_000, 1 / 18, atol=6 * np.sqrt(1 / 18 * 17 / 18 / 20_000))


def test_off_is_untouched():
    images = jnp.zeros((2, 28, 28), jnp.uint8)
    assert augment(images, KEY, TrainConfig()) is images


def test_training_sees_moved_images_and_evaluation_does_not(small):
    config = TrainConfig(hidden=(32,), train_eval_size=None)
    plain, shifted = (
        fit(small, small, key=KEY, config=config, epochs=1)
        for config in (config, TrainConfig(hidden=(32,), train_eval_size=None, shift=4, flip=True))
    )
    assert not np.array_equal(plain.history.running_loss, shifted.history.running_loss)
    # Both evaluations see the same images, so on the same set they agree.
    np.testing.assert_array_equal(shifted.history.train.loss, shifted.history.validation.loss)
