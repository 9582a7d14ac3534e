"""Steps, epochs and evaluations: every example counts once, and nothing else counts."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_worker import close, same

from fashion_jax.augment import shift_and_flip
from fashion_jax.config import TrainConfig, negative_log_likelihood
from fashion_jax.model import FashionMLP, normalize
from fashion_jax.steps import eval_step, evaluate, init_state, train_epoch, train_step
from fashion_jax.types import Batch

KEY = jax.random.key(0)
MODEL = FashionMLP(hidden=(16,))
CONFIG = TrainConfig(model=MODEL)
LINEAR = TrainConfig(model=FashionMLP(hidden=()))
SGD = TrainConfig(model=LINEAR.model, optimizer=optax.sgd)


class PerImage(nn.Module):
    """Undefined for images of one shade."""

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = normalize(images).reshape(len(images), -1)
        x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
        return nn.log_softmax(nn.Dense(10)(x))


@pytest.fixture(scope="module")
def data(small) -> Batch:
    return Batch(*map(jnp.array, small))


@pytest.fixture(scope="module")
def state():
    return init_state(KEY, config=CONFIG)


def part(batch, rows) -> Batch:
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def test_the_key_determines_the_initial_state(state):
    same(state, init_state(KEY, config=CONFIG, dropout_rate=0.5, learning_rate=0.1))
    other = init_state(jax.random.key(1), config=CONFIG)
    assert all((a != b).all() for a, b in zip(*map(jax.tree.leaves, (state.params, other.params)), strict=True))


def test_loss_and_schedule_are_those_of_the_config(data):
    """Twice the loss is twice the learning rate for gradient descent."""
    config = TrainConfig(
        model=SGD.model,
        loss=lambda log_probs, labels: 2 * negative_log_likelihood(log_probs, labels),
        optimizer=lambda learning_rate: optax.sgd(optax.linear_schedule(learning_rate, 0.0, 4)),
    )
    batch, state, expected = part(data, slice(64)), init_state(KEY, config=config), init_state(KEY, config=SGD)
    for learning_rate in (0.4, 0.3, 0.2):
        state, metrics = train_step(state, batch, KEY, config=config, learning_rate=0.2)
        expected, plain = train_step(expected, batch, KEY, config=SGD, learning_rate=learning_rate)
        assert float(metrics.loss) == pytest.approx(2 * float(plain.loss), rel=1e-5)
        close(state.params, expected.params, atol=1e-5)
    # Evaluations report the negative log likelihood, whatever the loss.
    same(evaluate(state.params, data, config=config), evaluate(state.params, data, config=SGD))


def test_a_weight_is_how_often_an_example_counts(data):
    counts = np.array([2, 0, 1, 3, 0])
    with jax.enable_x64(True):
        state, images = init_state(KEY, config=SGD), data.images[:5]
        predicted = SGD.model.apply({"params": state.params}, images, deterministic=True).argmax(axis=1)
        # All are right but the one that counts three times.
        batch = Batch(images, predicted.at[3].add(1) % 10)
        weighted = {"batch": batch, "weights": jnp.array(counts, float)}
        expected = train_step(state, part(batch, np.repeat(np.arange(5), counts)), KEY, config=SGD)
        assert float(expected[1].accuracy) == 0.5
        close(train_step(state, key=KEY, config=SGD, **weighted), expected, rtol=1e-10)
        close(eval_step(state.params, config=SGD, **weighted), expected[1], rtol=1e-10)


@pytest.mark.parametrize(("n", "size"), [(72, 64), (128, 64), (50, 10**9)])
def test_an_epoch_is_its_steps_on_unpadded_batches(data, n, size):
    """Documents the order and the keys. The masks of a shorter batch are the first rows of a longer one's."""
    data, config, steps = part(data, slice(n)), TrainConfig(model=MODEL, batch_size=size), -(-n // size)
    with jax.enable_x64(True):
        state = found = init_state(KEY, config=config)
        _, order_key, dropout_key = jax.random.split(KEY, 3)
        for epoch in range(2):
            order = jnp.argsort(jax.random.bits(jax.random.fold_in(order_key, epoch), (n,)))
            losses = []
            for i, key in enumerate(jax.random.split(jax.random.fold_in(dropout_key, epoch), steps)):
                batch = part(data, order[size * i : size * (i + 1)])
                state, metrics = train_step(state, batch, key, config=config, dropout_rate=0.2)
                losses.append(metrics.loss)
            found, found_losses = train_epoch(found, data, KEY, config=config, dropout_rate=0.2)
            close((found, found_losses), (state, jnp.array(losses)), atol=1e-10)


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


def test_augmentation_is_new_in_each_step_and_for_training_only(data):
    noise = TrainConfig(model=LINEAR.model, augment=lambda key, images: jax.random.bits(key, images.shape, jnp.uint8))
    state, flat = init_state(KEY, config=LINEAR), jax.tree.map(jnp.zeros_like, data)
    _, losses = train_epoch(state, flat, KEY, config=noise, learning_rate=0.0)
    assert len(set(losses.tolist())) == 16
    inverting = TrainConfig(model=LINEAR.model, augment=lambda key, images: 255 - images)
    batch = part(data, slice(64))
    expected = train_step(state, batch._replace(images=255 - batch.images), KEY, config=LINEAR)
    close(train_step(state, batch, KEY, config=inverting), expected, atol=1e-6)
    same(evaluate(state.params, batch, config=inverting), evaluate(state.params, batch, config=LINEAR))


@pytest.mark.parametrize("size", [7, 25, 10**9])
def test_an_evaluation_counts_each_example_once_whatever_the_chunks(data, size):
    """Padding is no image of its own: NaN times a weight of 0 would be NaN."""
    config, some = TrainConfig(model=PerImage(), eval_batch_size=size), part(data, slice(50))
    params = init_state(KEY, config=TrainConfig(model=PerImage())).params
    log_probs = np.asarray(PerImage().apply({"params": params}, some.images, deterministic=True), np.float64)
    # Another label changes the mean by the example's share.
    for labels in (some.labels.at[0].add(1) % 10, some.labels.at[-1].add(1) % 10):
        expected = -log_probs[np.arange(50), labels].mean(), (log_probs.argmax(axis=1) == labels).mean()
        metrics = evaluate(params, some._replace(labels=labels), config=config)
        np.testing.assert_allclose(metrics, expected, rtol=1e-6)


def test_an_evaluation_drops_nothing(state, data):
    same(*(evaluate(state.params, data, config=CONFIG, dropout_rate=rate) for rate in (0.0, 0.9)))


def test_lane_axes_of_the_parameters_stay_in_front(data):
    some, lanes = part(data, slice(100)), [init_state(jax.random.key(i), config=LINEAR).params for i in range(6)]
    each = jax.tree.map(lambda *leaves: np.array(leaves), *(evaluate(params, some, config=LINEAR) for params in lanes))
    assert len(set(each.loss.tolist())) == 6
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(2, 3, *leaves[0].shape), *lanes)
    metrics = evaluate(stacked, some, config=LINEAR)
    assert metrics.loss.shape == metrics.accuracy.shape == (2, 3)
    close([leaf.ravel() for leaf in metrics], list(each), rtol=1e-6)


def test_parameters_that_do_not_fit_model_and_images_are_named(state, data):
    extended = state.params | {"fc2": jax.tree.map(lambda leaf: leaf[None], state.params["fc2"])}
    with pytest.raises(ValueError, match=r"fc2\.bias must have shape \[10\], got \[1, 10\]; fc2\.kernel must"):
        evaluate(extended, data, config=CONFIG)
    with pytest.raises(ValueError, match=r"fc1\.kernel must have shape \[196, 16\], got \[784, 16\]"):
        evaluate(state.params, data._replace(images=data.images[:, ::2, ::2]), config=CONFIG)


def test_metrics_of_half_precision_are_means_in_full_precision():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, images, *, deterministic):
            self.param("unused", nn.initializers.zeros, (1,))
            return jnp.log(jnp.full((len(images), 2), 0.5, jnp.bfloat16))

    batch = Batch(jnp.zeros((1_000, 2, 2), jnp.uint8), jnp.arange(1_000) // 999)
    with jax.numpy_dtype_promotion("strict"):
        metrics = eval_step({"unused": jnp.zeros(1)}, batch, config=TrainConfig(model=Half()))
    assert (metrics.loss.dtype, float(metrics.accuracy)) == (jnp.float32, pytest.approx(0.999, abs=1e-6))
