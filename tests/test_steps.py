"""Steps, epochs and evaluations: every example counts once, and nothing else counts."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fashion_jax.config import TrainConfig, negative_log_likelihood
from fashion_jax.model import FashionMLP, normalize
from fashion_jax.steps import eval_step, evaluate, init_state, train_epoch, train_step
from fashion_jax.types import Batch

KEY = jax.random.key(0)
MODEL = FashionMLP(hidden=(16, 8))
CONFIG = TrainConfig(model=MODEL)
SGD = TrainConfig(model=MODEL, optimizer=optax.sgd)


class Tally(nn.Module):
    """One parameter per example. Its gradient is -1 / the size of the batch, for those in the batch."""

    n: int

    @nn.compact
    def __call__(self, images, *, deterministic):
        tally = self.param("tally", nn.initializers.zeros, (self.n,))
        high, low = images[:, 0, :2].astype(int).T
        number = 256 * high + low
        return jnp.broadcast_to(tally[number][:, None], (len(images), 10))


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


def equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def close(first, second, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), first, second)


def test_the_key_determines_the_initial_state(state):
    equal(state, init_state(KEY, config=CONFIG, dropout_rate=0.5, learning_rate=0.1))
    other = init_state(jax.random.key(1), config=CONFIG)
    assert all((a != b).all() for a, b in zip(*map(jax.tree.leaves, (state.params, other.params)), strict=True))


def test_loss_and_schedule_are_those_of_the_config(data):
    """Twice the loss is twice the learning rate for gradient descent."""
    config = TrainConfig(
        model=MODEL,
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
    equal(evaluate(state.params, data, config=config), evaluate(state.params, data, config=SGD))


def test_an_optimizer_may_ask_for_the_loss(data):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    config = TrainConfig(model=MODEL, optimizer=lambda learning_rate: optax.chain(optax.sgd(learning_rate), plateau))
    state, scales = init_state(KEY, config=config), []
    for _ in range(5):
        state, _ = train_step(state, part(data, slice(64)), KEY, config=config, learning_rate=0.0)
        scales.append(float(state.opt_state[1].scale))
    assert scales == [1, 1, 0.5, 0.5, 0.25]


def test_a_weight_is_how_often_an_example_counts(data):
    counts = np.array([2, 0, 1, 3, 0])
    with jax.enable_x64(True):
        state, images = init_state(KEY, config=SGD), data.images[:5]
        predicted = MODEL.apply({"params": state.params}, images, deterministic=True).argmax(axis=1)
        # All are right but the one that counts three times.
        batch = Batch(images, predicted.at[3].add(1) % 10)
        weighted = {"batch": batch, "weights": jnp.array(counts, float)}
        expected = train_step(state, part(batch, np.repeat(np.arange(5), counts)), KEY, config=SGD)
        assert float(expected[1].accuracy) == 0.5
        close(train_step(state, key=KEY, config=SGD, **weighted), expected, rtol=1e-10)
        close(eval_step(state.params, config=SGD, **weighted), expected[1], rtol=1e-10)


def test_the_key_drops_units_in_steps_and_nothing_does_in_evaluations(state, data):
    step = functools.partial(train_step, state, part(data, slice(64)), config=CONFIG)
    equal(step(KEY, dropout_rate=0.5), step(KEY, dropout_rate=0.5))
    equal(step(KEY, dropout_rate=0.0), step(jax.random.key(1), dropout_rate=0.0))
    assert len({float(step(jax.random.key(i), dropout_rate=0.5)[1].loss) for i in range(10)}) == 10
    dropping = TrainConfig(model=FashionMLP(hidden=(16, 8), dropout_rate=0.5))
    equal(*(evaluate(state.params, data, config=config) for config in (CONFIG, dropping)))


@pytest.mark.parametrize(
    ("n", "size", "sizes"), [(1000, 64, [64] * 15 + [40]), (128, 64, [64, 64]), (50, 10**9, [50]), (3, 1, [1] * 3)]
)
def test_an_epoch_takes_every_example_once_in_a_new_order(data, n, size, sizes):
    numbers = np.stack(np.divmod(np.arange(n), 256), axis=1).astype(np.uint8)
    numbered = Batch(data.images[:n].at[:, 0, :2].set(numbers), data.labels[:n])
    # Step t, from 1, adds t / (size of the batch) to what takes part in it.
    config = TrainConfig(model=Tally(n), batch_size=size, optimizer=lambda: optax.sgd(lambda count: count + 1))
    start = init_state(KEY, config=config)
    taken = [np.repeat(np.arange(len(sizes)), sizes)]
    for epoch in range(3):
        state, losses = train_epoch(start, numbered, KEY, config=config)
        assert (losses.shape, int(state.step)) == ((len(sizes),), (epoch + 1) * len(sizes))
        added = (epoch * len(sizes) + 1 + np.arange(len(sizes))) / sizes
        tally = np.asarray(state.params["tally"])
        taken.append(abs(tally[:, None] - added).argmin(axis=1))
        np.testing.assert_allclose(tally, added[taken[-1]], rtol=1e-6)
        assert np.bincount(taken[-1]).tolist() == sizes
        start = state._replace(params=start.params)
    if n == 1000:
        assert max((first == second).mean() for first, second in itertools.combinations(taken, 2)) < 0.15


def test_an_epoch_is_its_steps_on_unpadded_batches(data):
    """Documents the order and the keys. The masks of a shorter batch are the first rows of a longer one's."""
    with jax.enable_x64(True):
        state = found = init_state(KEY, config=CONFIG)
        _, order_key, dropout_key = jax.random.split(KEY, 3)
        for epoch in range(2):
            order = jnp.argsort(jax.random.bits(jax.random.fold_in(order_key, epoch), (1000,)))
            losses = []
            for i, key in enumerate(jax.random.split(jax.random.fold_in(dropout_key, epoch), 16)):
                batch = part(data, order[64 * i : 64 * (i + 1)])
                state, metrics = train_step(state, batch, key, config=CONFIG, dropout_rate=0.2)
                losses.append(metrics.loss)
            after = train_epoch(found, data, KEY, config=CONFIG, dropout_rate=0.2)
            close(after, (state, jnp.array(losses)), atol=1e-10)
            equal(after, train_epoch(found, data, KEY, config=CONFIG, dropout_rate=0.2))
            other = train_epoch(found, data, jax.random.key(1), config=CONFIG, dropout_rate=0.2)
            assert (other[1] != after[1]).all()
            found, _ = after


def test_augmentation_is_new_in_each_step_and_for_training_only(state, data):
    flat = Batch(jnp.zeros_like(data.images), jnp.zeros_like(data.labels))
    noise = TrainConfig(model=MODEL, augment=lambda key, images: jax.random.bits(key, images.shape, jnp.uint8))
    for config, different in ((CONFIG, 1), (noise, 16)):
        _, losses = train_epoch(state, flat, KEY, config=config, learning_rate=0.0)
        assert len(set(losses.tolist())) == different
    inverting = TrainConfig(model=MODEL, augment=lambda key, images: 255 - images)
    batch, inverted = part(data, slice(64)), part(data._replace(images=255 - data.images), slice(64))
    expected = train_step(state, inverted, KEY, config=CONFIG, dropout_rate=0.2)
    close(train_step(state, batch, KEY, config=inverting, dropout_rate=0.2), expected, atol=1e-6)
    equal(evaluate(state.params, data, config=inverting), evaluate(state.params, data, config=CONFIG))


@pytest.mark.parametrize("size", [1, 7, 25, 49, 10**9])
def test_an_evaluation_counts_each_example_once_whatever_the_chunks(state, data, size):
    config, some = TrainConfig(model=MODEL, eval_batch_size=size), part(data, slice(50))
    log_probs = np.asarray(MODEL.apply({"params": state.params}, some.images, deterministic=True), np.float64)
    # Another label changes the mean by the example's share.
    for labels in (some.labels.at[0].add(1) % 10, some.labels.at[-1].add(1) % 10):
        expected = -log_probs[np.arange(50), labels].mean(), (log_probs.argmax(axis=1) == labels).mean()
        metrics = evaluate(state.params, some._replace(labels=labels), config=config)
        np.testing.assert_allclose(metrics, expected, rtol=1e-6)


def test_padding_is_no_image_of_its_own(data):
    """NaN times a weight of 0 would be NaN."""
    config, some = TrainConfig(model=PerImage(), batch_size=20, eval_batch_size=20), part(data, slice(50))
    state, losses = train_epoch(init_state(KEY, config=config), some, KEY, config=config)
    metrics = evaluate(state.params, some, config=config)
    assert np.isfinite([*losses, *metrics]).all()
    close(metrics, eval_step(state.params, some, config=config), rtol=1e-5)


def test_lane_axes_of_the_parameters_stay_in_front(data):
    some, lanes = part(data, slice(100)), [init_state(jax.random.key(i), config=CONFIG).params for i in range(6)]
    each = jax.tree.map(lambda *leaves: np.array(leaves), *(evaluate(params, some, config=CONFIG) for params in lanes))
    assert len(set(each.loss.tolist())) == 6
    for axes in ((6,), (2, 3), (1, 6)):
        stacked = jax.tree.map(lambda *leaves, axes=axes: jnp.stack(leaves).reshape(*axes, *leaves[0].shape), *lanes)
        metrics = evaluate(stacked, some, config=CONFIG)
        assert metrics.loss.shape == metrics.accuracy.shape == axes
        close([leaf.ravel() for leaf in metrics], list(each), rtol=1e-6)


def test_parameters_that_do_not_fit_model_and_images_are_named(state, data):
    with pytest.raises(ValueError, match=r"params do not fit the model: fc1\.bias must have shape \[16\], got \[256\]"):
        evaluate(init_state(KEY).params, data, config=CONFIG)
    with pytest.raises(ValueError, match=r"fc3\.bias must have shape \[10\], got \[1, 10\]; fc3\.kernel must"):
        evaluate(
            state.params | {"fc3": jax.tree.map(lambda leaf: leaf[None], state.params["fc3"])}, data, config=CONFIG
        )
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
