"""Networks of other kinds: with statistics of their batches, with convolutions, written in NNX."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sweep_worker import equal, parts

from fashion_jax import Dropout, FashionMLP, TrainConfig, evaluate, fit, predict, predict_mc, sweep
from fashion_jax._convolution import convolve
from fashion_jax.interop import export, load_exported
from fashion_jax.model import normalize
from fashion_jax.nnx import Dropout as NNXDropout
from fashion_jax.nnx import from_nnx
from fashion_jax.train import init_state, train_epoch
from fashion_jax.types import Best

KEY = jax.random.key(2)
OPTIONS = {"learning_rate": 0.01, "dropout_rate": 0.2}


class Normed(nn.Module):
    """One hidden layer with batch normalization; called with images of any shape."""

    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = nn.Dense(8, name="fc1")(normalize(images).reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=deterministic, momentum=0.9, name="norm")(x)
        x = Dropout(self.dropout_rate)(nn.relu(x), deterministic=deterministic)
        return nn.log_softmax(nn.Dense(10, name="fc2")(x))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, images, *, deterministic):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(normalize(images)[..., None]))
        x = nn.relu(nn.Conv(6, (3, 3), padding="VALID")(x))
        return nn.log_softmax(nn.Dense(10)(x.reshape(len(x), -1)))


class NNXPerceptron(nnx.Module):
    """The tutorial's network as one would write it in NNX."""

    def __init__(self, hidden=(256, 128, 64), dropout_rate=0.0, *, rngs):
        widths = (784, *hidden, 10)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
            setattr(self, f"fc{i}", nnx.Linear(inputs, outputs, rngs=rngs))
        self.dropouts = nnx.List([NNXDropout(dropout_rate, rngs=rngs) for _ in hidden])

    def __call__(self, images):
        x = normalize(images).reshape(len(images), -1)
        for i, dropout in enumerate(self.dropouts, start=1):
            x = dropout(nnx.relu(getattr(self, f"fc{i}")(x)))
        return nnx.log_softmax(self.fc4(x))


class LinenPerceptron(FashionMLP):
    """The same in Linen, with the masks that NNX draws: each layer has a stream of its own, counted from one key."""

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = normalize(images).reshape(len(images), -1)
        step = None if deterministic else self.make_rng("dropout")
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, name=f"fc{i + 1}")(x))
            if step is not None:
                key = jax.random.fold_in(jax.random.fold_in(step, i), 0)
                x = jnp.where(jax.random.uniform(key, x.shape) >= self.dropout_rate, x / (1 - self.dropout_rate), 0)
        return nn.log_softmax(nn.Dense(10, name="fc4")(x))


@pytest.fixture(scope="module")
def data(small, splits):
    return parts(small, splits)


def close(first, second, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), first, second)


def test_an_nnx_network_trains_as_in_linen(data):
    model, numbers = from_nnx(NNXPerceptron), {"dropout_rate": 0.2, "epochs": 3}
    start = Best(init_state(KEY, config=TrainConfig(model=model)).params, np.inf, 0)
    runs = [
        fit(*data, key=KEY, config=TrainConfig(model=of), start=start, **numbers) for of in (model, LinenPerceptron())
    ]
    close(runs[0].history, runs[1].history, rtol=2e-3)
    close(runs[0].state.params, runs[1].state.params, atol=2e-3)
    config = TrainConfig(model=model)
    without = fit(*data, key=KEY, config=config, start=start, epochs=3)
    assert without.history.running_loss[2] < runs[0].history.running_loss[2] - 0.01
    assert predict(runs[0].best, data[1].images[:5], config=config).shape == (5, 10)


@pytest.mark.usefixtures("unchecked")
def test_an_nnx_network_has_flax_own_dropout_at_a_fixed_rate_only(data):
    class Net(nnx.Module):
        def __init__(self, rate=0.5, *, rngs):
            self.out, self.dropout = nnx.Linear(784, 10, rngs=rngs), nnx.Dropout(rate, rngs=rngs)

        def __call__(self, images):
            return nnx.log_softmax(self.out(self.dropout(normalize(images).reshape(len(images), -1))))

    class Fixed(Net):
        def __init__(self, *, rngs):
            super().__init__(0.5, rngs=rngs)

    with pytest.warns(match="the losses have not changed since epoch 1"):
        run = fit(*data, key=KEY, config=TrainConfig(model=from_nnx(Fixed)), epochs=2, learning_rate=0.0)
    assert run.history.running_loss[0] != run.history.running_loss[1]
    with pytest.raises(TypeError, match=r"must take rate traced; use the Dropout of fashion_jax or fashion_jax\.nnx"):
        fit(*data, key=KEY, config=TrainConfig(model=from_nnx(Net)), epochs=1)
    with pytest.raises(TypeError, match="from_nnx"):
        TrainConfig(model=Fixed(rngs=nnx.Rngs(0)))


def test_batch_statistics_are_those_of_the_images_and_not_of_padding(data):
    """With learning rate 0 the weights stay, so that NumPy can tell the running statistics of an epoch."""
    train, _ = data
    config = TrainConfig(model=Normed())
    state = init_state(KEY, config=config)
    after, _ = train_epoch(state, jax.tree.map(jnp.array, train), KEY, config=config, learning_rate=0.0)
    order = np.argsort(jax.random.bits(jax.random.fold_in(jax.random.split(KEY, 3)[1], 0), (200,)))
    weights = jax.tree.map(np.float64, state.params["fc1"])
    hidden = (train.images[order].reshape(200, -1) / 127.5 - 1) @ weights["kernel"] + weights["bias"]
    mean, var = np.zeros(8), np.ones(8)
    for batch in np.split(hidden, [64, 128, 192]):
        mean, var = 0.9 * mean + 0.1 * batch.mean(axis=0), 0.9 * var + 0.1 * batch.var(axis=0)
    found = after.collections["batch_stats"]["norm"]
    close((found["mean"], found["var"]), (mean, var), rtol=1e-4, atol=1e-5)

    # Evaluations take the running statistics, whatever the chunks.
    x = np.maximum((hidden - mean) / np.sqrt(var + 1e-5), 0)
    logits = x @ np.float64(state.params["fc2"]["kernel"]) + np.float64(state.params["fc2"]["bias"])
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -log_probs[np.arange(200), train.labels[order]].mean()
    for size in (200, 7):
        metrics = evaluate(after, train, config=TrainConfig(model=Normed(), eval_batch_size=size))
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)


def test_collections_travel_with_the_parameters(data, tmp_path):
    config = TrainConfig(model=Normed())
    whole = fit(*data, key=KEY, config=config, epochs=4, **OPTIONS)
    fit(*data, key=KEY, config=config, epochs=2, checkpoint=tmp_path, **OPTIONS)
    equal(fit(*data, key=KEY, config=config, epochs=4, checkpoint=tmp_path, **OPTIONS), whole)
    result = sweep(*data, seeds=[2, 3], config=config, epochs=4, **OPTIONS)
    equal(result.at(seed=2), whole)
    validation = data[1]
    close(evaluate(result.best, validation, config=config).loss, result.best.loss, rtol=1e-5)
    close(evaluate(whole.state, validation, config=config).loss, whole.history.validation.loss[-1], rtol=1e-5)
    resumed = fit(*data, key=KEY, config=config, epochs=1, start=whole.state, **OPTIONS)
    assert resumed.history.running_loss[0] < whole.history.running_loss[1]
    export(tmp_path / "network", whole.best, config=config)
    probabilities = predict(whole.best, validation.images[:9], config=config)
    close(load_exported(tmp_path / "network")(validation.images[:9]), probabilities, rtol=1e-5)
    with pytest.raises(ValueError, match="needs batch_stats too; pass a state or a best"):
        predict(whole.best.params, validation.images[:9], config=config)
    with pytest.raises(ValueError, match="BatchNorm would take the statistics of a single image; use predict"):
        predict_mc(whole.best, validation.images[:9], key=KEY, samples=2, config=config)


@pytest.mark.parametrize(
    ("images", "kernel", "options"),
    [
        ((2, 9, 8, 4), (3, 2, 4, 6), {"window_strides": (2, 1), "padding": "SAME"}),
        ((2, 9, 8, 4), (3, 3, 2, 6), {"window_strides": (1, 1), "padding": "VALID", "feature_group_count": 2}),
        ((3, 11, 4), (3, 4, 5), {"window_strides": (2,), "padding": [(1, 2)], "rhs_dilation": (2,)}),
    ],
)
def test_a_convolution_and_its_gradients_are_jax_s(images, kernel, options):
    letters = "HW"[: len(images) - 2]
    options = options | {"dimension_numbers": (f"N{letters}C", f"{letters}IO", f"N{letters}C")}
    images, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((images, kernel)))

    def gradients(function):
        return jax.grad(lambda *inputs: (function(*inputs, **options) ** 3).sum(), argnums=(0, 1))(images, kernel)

    close(gradients(convolve), gradients(jax.lax.conv_general_dilated), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("model", [Convolutional(), FashionMLP(hidden=())], ids=["convolutions", "none"])
def test_convolutions_inside_the_epoch_have_their_axes_in_the_order_of_the_fast_library(data, model):
    """XLA orders the axes of convolutions outside of loops only."""
    config, train = TrainConfig(model=model), jax.tree.map(jnp.array, data[0])
    state = init_state(KEY, config=config)
    program = train_epoch.lower(state, train, KEY, config=config).compile().as_text()
    found = re.findall(r"dim_labels=(\w+->\w+)", program)
    # Forward, gradients of both kernels, and of the images of the second layer.
    assert found == (["b01f_01io->b01f"] * 5 if model == Convolutional() else [])
