"""Class probabilities against float64 NumPy, and Monte Carlo dropout against a loop over thinned networks."""

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


class Plain(nn.Module):
    """A network without dropout, whose log-probabilities are bfloat16."""

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = normalize(images).reshape(len(images), -1)
        return nn.log_softmax(nn.Dense(10)(x)).astype(jnp.bfloat16)


class Fixed(Plain):
    """Flax's own dropout on the input, at a rate that is no field."""

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = normalize(images).reshape(len(images), -1)
        x = nn.Dropout(0.5)(x, deterministic=deterministic)
        return nn.log_softmax(nn.Dense(10)(x))


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
    correct = int((probabilities.argmax(axis=1) == splits.test.labels).sum())
    assert correct == round(10_000 * float(trained.history.validation.accuracy[-1]))


@pytest.mark.parametrize("n", [0, 1, 2, *SIZES[1:], SIZES[-1] + 5])
def test_a_row_does_not_depend_on_the_other_images(params, images, n):
    close(predict(params, images[:n]), predict(params, images[:1_500])[:n], atol=1e-6)
    close(predict(params, jnp.array(images[:n])), predict(params, images[:n]), atol=0)
    whole = predict_mc(params, images[:1_500], **MC)
    close(predict_mc(params, images[:n], **MC), jax.tree.map(lambda leaf: leaf[:n], whole))


def test_no_number_of_images_or_samples_and_no_rate_compiles_again(params, images):
    compiled = []
    for numbers in (SIZES, (1, 2, SIZES[-1] + 70)):
        for n in numbers:
            predict(params, images[:n])
            predict_mc(params, images[:n], key=jax.random.key(n), samples=1 + n % 40, dropout_rate=n / 2_000)
            predict_mc(params, images[:n], key=KEY, samples=1, dropout_rate=0.0)
        compiled.append((_log_probs._cache_size(), _sample._cache_size()))
    assert compiled[0] == compiled[1]


def test_lane_axes_stay_in_front(params, images):
    key, options = jax.random.key(1), MC | {"samples": 2}
    lanes = [params, init_state(key).params, jax.tree.map(jnp.zeros_like, params)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves)[None], *lanes)
    images = images[: SIZES[-1] + 3]  # Two chunks.
    probabilities, drawn = predict(stacked, images), predict_mc(stacked, images, **options)
    assert probabilities.shape == drawn.std.shape == (1, 3, len(images), 10)
    for i, lane in enumerate(lanes):
        close(probabilities[0, i], predict(lane, images))
        close(jax.tree.map(lambda leaf, i=i: leaf[0, i], drawn), predict_mc(lane, images, **options))


def test_monte_carlo_is_a_loop_over_thinned_networks(params, images):
    model = FashionMLP(dropout_rate=0.3)

    @jax.jit
    def thinned(image, sample):
        rngs = {"dropout": jax.random.fold_in(KEY, sample)}
        return jnp.exp(model.apply({"params": params}, image[None], deterministic=False, rngs=rngs)[0])

    drawn = np.array([[thinned(image, sample) for image in images[:5]] for sample in range(37)], np.float64)
    mean = drawn.mean(axis=0)
    prediction = predict_mc(params, images[:5], **MC)
    close(prediction.probabilities, mean, atol=1e-6)
    close(prediction.std, drawn.std(axis=0))
    close(prediction.entropy, -(mean * np.log(mean)).sum(axis=1))
    # The mutual information is also the mean divergence of the samples from their mean.
    close(prediction.mutual_information, rel_entr(drawn, mean).sum(axis=2).mean(axis=0))
    close(predict_mc(params, images[:5], key=KEY, samples=37, config=TrainConfig(model=model)), prediction, atol=0)


@pytest.mark.parametrize("samples", [1, SAMPLES_AT_ONCE, SAMPLES_AT_ONCE + 1])
def test_at_rate_0_all_samples_are_the_plain_prediction(params, images, samples):
    prediction = predict_mc(params, images[:40], key=KEY, samples=samples, dropout_rate=0.0)
    close(prediction.probabilities, predict(params, images[:40]), atol=1e-6)
    close((prediction.std, prediction.mutual_information), (np.zeros((40, 10)), np.zeros(40)), atol=1e-7)
    assert (prediction.mutual_information >= 0).all()


def test_models_of_the_user_s_own_are_predicted(splits):
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1_000]), splits.test)
    for model in (Plain(), Fixed()):
        config = TrainConfig(model=model)
        params = init_state(KEY, config=config).params
        probabilities = predict(params, batch.images, config=config)
        assert probabilities.dtype == np.float32
        accuracy = (probabilities.argmax(axis=1) == splits.test.labels[:1_000]).mean()
        assert accuracy == pytest.approx(float(evaluate(params, batch, config=config).accuracy), abs=1e-6)
    prediction = predict_mc(params, splits.test.images[:9], key=KEY, samples=20, config=config)
    assert prediction.std.max() > 0.01


class Tempered(nn.Module):
    temperature: float | jax.Array = 1.0

    @nn.compact
    def __call__(self, images, *, deterministic):
        return nn.log_softmax(nn.Dense(10)(normalize(images).reshape(len(images), -1)) / self.temperature)


def test_fields_that_matter_with_dropout_off_are_replaced(images):
    config = TrainConfig(model=Tempered())
    params = init_state(KEY, config=config).params
    plain, hot = (predict(params, images, config=config, **numbers) for numbers in ({}, {"temperature": 2.0}))
    close(hot, np.sqrt(plain) / np.sqrt(plain).sum(axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(TypeError, match="slope"):
        predict(params, images, config=config, slope=1.0)


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(model=Plain())])
def test_a_model_that_drops_nothing_has_no_monte_carlo(images, config):
    params = init_state(KEY, config=config).params
    with pytest.raises(ValueError, match="drops nothing; pass the rate that it was trained with"):
        predict_mc(params, images[:2], key=KEY, samples=2, config=config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [[0]]}, TypeError, "images must be a NumPy or JAX array, got list"),
        ({"images": np.zeros((28, 28), np.uint8)}, ValueError, r"images must have shape \[n, height, width\]"),
        ({"images": np.zeros((2, 14, 28), np.uint8)}, ValueError, r"fc1.kernel must have shape \[392, 256\]"),
        ({"config": TrainConfig(model=FashionMLP((256, 64)))}, ValueError, "fc4.kernel is not part of the model"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"dropout_rate": 1.0}, ValueError, r"dropout_rate must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(params, unchecked, change, error, message):
    arguments = {"params": params, "images": np.zeros((2, 28, 28), np.uint8), "config": TrainConfig()} | change
    with pytest.raises(error, match=message):
        predict_mc(**MC | arguments)
    if not change.keys() & MC.keys():
        with pytest.raises(error, match=message):
            predict(**arguments)
