"""Class probabilities against float64 NumPy, and Monte Carlo dropout against a loop over thinned networks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from scipy.special import rel_entr

from fashion_jax.config import TrainConfig
from fashion_jax.inference import SAMPLES_AT_ONCE, SIZES, _log_probs, _sample, predict, predict_mc
from fashion_jax.model import FashionMLP, normalize
from fashion_jax.steps import evaluate, init_state

KEY = jax.random.key(5)
MC = {"key": KEY, "samples": 37, "dropout_rate": 0.3}


class Own(nn.Module):
    """Flax's own dropout on the input, at a rate that is no field, and a field that matters with dropout off."""

    temperature: float | jax.Array = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = nn.Dropout(0.5)(normalize(images).reshape(len(images), -1), deterministic=deterministic)
        return nn.log_softmax(nn.Dense(10)(x) / self.temperature).astype(self.dtype)


@pytest.fixture(scope="module")
def params(trained):
    return trained.state.params


@pytest.fixture(scope="module")
def images(splits):
    return splits.test.images


def close(actual, expected, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected)


def test_probabilities_are_those_of_float64_and_accuracy_is_that_of_fit(trained, params, splits):
    probabilities = predict(params, splits.test.images)
    _, log_probs, _ = parity.loss_and_gradient(params, splits.test)
    close(probabilities, np.exp(log_probs))
    accuracy = (probabilities.argmax(axis=1) == splits.test.labels).mean()
    assert accuracy == pytest.approx(trained.history.validation.accuracy[-1], abs=1e-6)


def test_a_row_does_not_depend_on_the_other_images(params, images):
    whole, drawn = predict(params, images[:1_100]), predict_mc(params, images[:1_100], **MC)
    for n in (0, 1, 2, SIZES[-1] + 5):
        some = images[:n]
        close(predict(params, some), whole[:n], atol=1e-6)
        close(predict(params, jnp.array(some)), predict(params, some), atol=0)
        close(predict_mc(params, some, **MC), jax.tree.map(lambda leaf, n=n: leaf[:n], drawn))


def test_no_number_of_images_or_samples_and_no_rate_compiles_again(params, images):
    def programs(*numbers):
        for n in numbers:
            predict(params, images[:n])
            predict_mc(params, images[:n], key=jax.random.key(n), samples=1 + n % 40, dropout_rate=n % 10 / 10)
        return _log_probs._cache_size(), _sample._cache_size()

    assert programs(*SIZES) == programs(1, 2, 10, SIZES[-1] + 70)


def test_lane_axes_stay_in_front(params, images):
    def both(params):
        some = images[: SIZES[-1] + 3]  # Two chunks.
        return predict(params, some), predict_mc(params, some, **MC | {"samples": 2})

    lanes = [params, init_state(KEY).params, jax.tree.map(jnp.zeros_like, params)]
    found = both(jax.tree.map(lambda *leaves: np.stack(leaves)[None], *lanes))
    for i, lane in enumerate(lanes):
        close(jax.tree.map(lambda leaf, i=i: leaf[0, i], found), both(lane))


def test_monte_carlo_is_a_loop_over_thinned_networks(params, images):
    model = FashionMLP(dropout_rate=0.3)

    @jax.jit
    def thinned(image, sample):
        rngs = {"dropout": jax.random.fold_in(KEY, sample)}
        return jnp.exp(model.apply({"params": params}, image[None], deterministic=False, rngs=rngs)[0])

    drawn = np.array([[thinned(image, sample) for image in images[:5]] for sample in range(37)], np.float64)
    mean, prediction = drawn.mean(axis=0), predict_mc(params, images[:5], **MC)
    close(prediction.probabilities, mean, atol=1e-6)
    close(prediction.std, drawn.std(axis=0))
    close(prediction.entropy, -(mean * np.log(mean)).sum(axis=1))
    # The mutual information is also the mean divergence of the samples from their mean.
    close(prediction.mutual_information, rel_entr(drawn, mean).sum(axis=2).mean(axis=0))
    close(predict_mc(params, images[:5], key=KEY, samples=37, config=TrainConfig(model=model)), prediction, atol=0)


def test_at_rate_0_all_samples_are_the_plain_prediction(params, images):
    for samples in (1, SAMPLES_AT_ONCE + 1):
        prediction = predict_mc(params, images[:40], key=KEY, samples=samples, dropout_rate=0.0)
        close(prediction.probabilities, predict(params, images[:40]), atol=1e-6)
        close((prediction.std, prediction.mutual_information), (np.zeros((40, 10)), np.zeros(40)), atol=1e-7)
        assert (prediction.mutual_information >= 0).all()
    with pytest.raises(ValueError, match="drops nothing; pass the rate that it was trained with"):
        predict_mc(params, images[:2], key=KEY, samples=2)


def test_models_of_the_user_s_own_are_predicted(images, splits):
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1_000]), splits.test)
    half, config = (TrainConfig(model=Own(dtype=dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    params = init_state(KEY, config=config).params
    probabilities = predict(params, batch.images, config=half)
    assert probabilities.dtype == np.float32
    accuracy = (probabilities.argmax(axis=1) == splits.test.labels[:1_000]).mean()
    assert accuracy == pytest.approx(float(evaluate(params, batch, config=half).accuracy), abs=1e-6)
    assert predict_mc(params, images[:9], key=KEY, samples=20, config=half).std.max() > 0.01

    plain, hot = (predict(params, images, config=config, **numbers) for numbers in ({}, {"temperature": 2.0}))
    close(hot, np.sqrt(plain) / np.sqrt(plain).sum(axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(TypeError, match="slope"):
        predict(params, images, config=config, slope=1.0)
