"""Networks of other kinds: with statistics of their batches, with convolutions, written in NNX."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sweep_worker import close, equal

from fashion_jax import TrainConfig, evaluate, fit, predict, predict_mc, sweep
from fashion_jax._convolution import convolve
from fashion_jax.interop import export, load_exported
from fashion_jax.model import normalize
from fashion_jax.networks import NormalizedMLP
from fashion_jax.nnx import Dropout as NNXDropout
from fashion_jax.nnx import from_nnx
from fashion_jax.train import init_state, train_epoch
from fashion_jax.types import Best

KEY = jax.random.key(2)
NORMED = TrainConfig(model=NormalizedMLP((8,)))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, images, *, deterministic):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(normalize(images)[..., None]))
        x = nn.relu(nn.Conv(6, (3, 3), padding="VALID")(x))
        return nn.log_softmax(nn.Dense(10)(x.reshape(len(x), -1)))


class NNXPerceptron(nnx.Module):
    """The tutorial's network as one would write it in NNX."""

    def __init__(self, dropout_rate=0.0, *, rngs):
        sizes = ((784, 256), (256, 128), (128, 64), (64, 10))
        self.fc1, self.fc2, self.fc3, self.fc4 = (nnx.Linear(*size, rngs=rngs) for size in sizes)
        self.dropouts = nnx.List([NNXDropout(dropout_rate, rngs=rngs) for _ in range(3)])

    def __call__(self, images):
        x = normalize(images).reshape(len(images), -1)
        for layer, dropout in zip((self.fc1, self.fc2, self.fc3), self.dropouts, strict=True):
            x = dropout(nnx.relu(layer(x)))
        return nnx.log_softmax(self.fc4(x))


class LinenPerceptron(nn.Module):
    """The same in Linen, with the masks that NNX draws: each layer has a stream of its own, counted from one key."""

    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = normalize(images).reshape(len(images), -1)
        step = None if deterministic else self.make_rng("dropout")
        for i, width in enumerate((256, 128, 64)):
            x = nn.relu(nn.Dense(width, name=f"fc{i + 1}")(x))
            if step is not None:
                key = jax.random.fold_in(jax.random.fold_in(step, i), 0)
                x = jnp.where(jax.random.uniform(key, x.shape) >= self.dropout_rate, x / (1 - self.dropout_rate), 0)
        return nn.log_softmax(nn.Dense(10, name="fc4")(x))


def test_an_nnx_network_trains_as_in_linen(data):
    configs = [TrainConfig(model=model) for model in (from_nnx(NNXPerceptron), LinenPerceptron())]
    start = Best(init_state(KEY, config=configs[0]).params, np.inf, 0)
    run, linen = (fit(*data, key=KEY, config=config, epochs=3, start=start, dropout_rate=0.2) for config in configs)
    close(run.history, linen.history, rtol=2e-3)
    close(run.state.params, linen.state.params, atol=2e-3)
    images = data[1].images[:5]
    close(predict(run.best, images, config=configs[0]), predict(linen.best, images, config=configs[1]), atol=2e-3)


@pytest.mark.usefixtures("unchecked")
def test_an_nnx_network_has_flax_own_dropout_at_a_fixed_rate_only(data):
    class Net(nnx.Module):
        def __init__(self, rate=None, *, rngs):
            self.out = nnx.Linear(784, 10, rngs=rngs)
            self.dropout = nnx.Dropout(0.5 if rate is None else rate, rngs=rngs)

        def __call__(self, images):
            return nnx.log_softmax(self.out(self.dropout(normalize(images).reshape(len(images), -1))))

    with pytest.warns(match="the losses have not changed since epoch 1"):
        run = fit(*data, key=KEY, config=TrainConfig(model=from_nnx(Net)), epochs=2, learning_rate=0.0)
    assert run.history.running_loss[0] != run.history.running_loss[1]
    with pytest.raises(TypeError, match=r"must take rate traced; use the Dropout of fashion_jax or fashion_jax\.nnx"):
        fit(*data, key=KEY, config=TrainConfig(model=from_nnx(Net, rate=0.5)), epochs=1)
    with pytest.raises(TypeError, match="from_nnx"):
        TrainConfig(model=Net(rngs=nnx.Rngs(0)))


def test_batch_statistics_are_those_of_the_images_and_not_of_padding(data):
    """With learning rate 0 the weights stay, so that NumPy can tell the running statistics of an epoch."""
    train, state = data[0], init_state(KEY, config=NORMED)
    after, _ = train_epoch(state, jax.tree.map(jnp.array, train), KEY, config=NORMED, learning_rate=0.0)
    order = np.argsort(jax.random.bits(jax.random.fold_in(jax.random.split(KEY, 3)[1], 0), (200,)))
    first, second = (jax.tree.map(np.float64, state.params[name]) for name in ("Dense_0", "Dense_1"))
    hidden = (train.images[order].reshape(200, -1) / 127.5 - 1) @ first["kernel"] + first["bias"]
    mean, var = np.zeros(8), np.ones(8)
    for batch in np.split(hidden, [64, 128, 192]):
        mean, var = 0.99 * mean + 0.01 * batch.mean(axis=0), 0.99 * var + 0.01 * batch.var(axis=0)
    found = after.collections["batch_stats"]["BatchNorm_0"]
    close((found["mean"], found["var"]), (mean, var), rtol=1e-4, atol=1e-6)

    # Evaluations take the running statistics.
    logits = np.maximum((hidden - mean) / np.sqrt(var + 1e-5), 0) @ second["kernel"] + second["bias"]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -log_probs[np.arange(200), train.labels[order]].mean()
    np.testing.assert_allclose(evaluate(after, train, config=NORMED).loss, loss, rtol=1e-5)


def test_collections_travel_with_the_parameters(data, tmp_path):
    how = {"config": NORMED, "epochs": 4, "learning_rate": 0.01, "dropout_rate": 0.2}
    whole = fit(*data, key=KEY, **how)
    assert (fit(*data, key=KEY, **how | {"dropout_rate": 0.0}).history.running_loss != whole.history.running_loss).all()
    fit(*data, key=KEY, checkpoint=tmp_path, **how | {"epochs": 2})
    equal(fit(*data, key=KEY, checkpoint=tmp_path, **how), whole)
    result = sweep(*data, seeds=[2, 3], **how)
    equal(result.at(seed=2), whole)
    close(evaluate(result.best, data[1], config=NORMED).loss, result.best.loss, rtol=1e-5)
    resumed = fit(*data, key=KEY, start=whole.state, **how | {"epochs": 1})
    assert resumed.history.running_loss[0] < whole.history.running_loss[1]
    images = data[1].images[:9]
    export(tmp_path / "network", whole.best, config=NORMED)
    close(load_exported(tmp_path / "network")(images), predict(whole.best, images, config=NORMED), rtol=1e-5)
    with pytest.raises(ValueError, match="needs batch_stats too; pass a state or a best"):
        predict(whole.best.params, images, config=NORMED)
    with pytest.raises(ValueError, match="BatchNorm would take the statistics of a single image; use predict"):
        predict_mc(whole.best, images, key=KEY, samples=2, config=NORMED)


@pytest.mark.parametrize(
    ("images", "kernel", "options"),
    [
        ((2, 9, 8, 4), (3, 2, 2, 6), ((2, 1), "SAME", None, None, ("NHWC", "HWIO", "NHWC"), 2)),
        ((3, 11, 4), (3, 4, 5), ((2,), [(1, 2)], None, (2,), ("NWC", "WIO", "NWC"))),
    ],
)
def test_a_convolution_and_its_gradients_are_jax_s(images, kernel, options):
    images, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((images, kernel)))

    def gradients(function):
        return jax.grad(lambda *inputs: (function(*inputs, *options) ** 3).sum(), argnums=(0, 1))(images, kernel)

    close(gradients(convolve), gradients(jax.lax.conv_general_dilated), rtol=1e-4, atol=1e-3)


def test_convolutions_inside_the_epoch_have_their_axes_in_the_order_of_the_fast_library(data):
    """XLA orders the axes of convolutions outside of loops only."""
    config, train = TrainConfig(model=Convolutional()), jax.tree.map(jnp.array, data[0])
    program = train_epoch.lower(init_state(KEY, config=config), train, KEY, config=config).compile().as_text()
    # Forward, gradients of both kernels, and of the images of the second layer.
    assert re.findall(r"dim_labels=(\w+->\w+)", program) == ["b01f_01io->b01f"] * 5
