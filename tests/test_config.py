"""Structure is static, numbers are traced: where hyperparameters go, and what is compiled."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fashion_jax.config import TrainConfig
from fashion_jax.hyperparameters import complete, compose
from fashion_jax.model import Dropout, FashionMLP, normalize
from fashion_jax.steps import evaluate, init_state, train_epoch, train_step
from fashion_jax.types import Batch

KEY = jax.random.key(0)
RATE = {"learning_rate": 0.003}


class TwoRates(nn.Module):
    """A rate for each layer, a size annotated with text, a switch, and a name that optimizers have, too."""

    width: "int" = 32
    bias: bool = True
    first: float | jax.Array = 0.0
    second: float | jax.Array = 0.1
    b1: float | jax.Array = 0.5

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = normalize(images).reshape(len(images), -1)
        for rate in (self.first, self.second):
            x = Dropout(rate)(nn.relu(nn.Dense(self.width)(x)), deterministic=deterministic)
        return nn.log_softmax(nn.Dense(10, use_bias=self.bias)(x))


@pytest.fixture(scope="module")
def batch(small) -> Batch:
    return Batch(*(jnp.array(leaf[:64]) for leaf in small))


@pytest.mark.parametrize(
    ("fields", "given", "expected"),
    [
        ({}, {}, {"dropout_rate": 0.0} | RATE),
        ({"model": FashionMLP(dropout_rate=0.5)}, {"b1": 0.8}, {"dropout_rate": 0.5, "b1": 0.8} | RATE),
        ({"model": TwoRates(), "optimizer": lambda: optax.sgd(0.1)}, {}, {"first": 0.0, "second": 0.1, "b1": 0.5}),
        ({"optimizer": functools.partial(optax.adamw, 0.1)}, {"b2": 0.9}, {"dropout_rate": 0.0, "b2": 0.9}),
        ({"optimizer": lambda **all: optax.sgd(**all)}, {"nesterov": 1}, {"dropout_rate": 0.0, "nesterov": 1}),
    ],
)
def test_defaults_are_the_model_s_and_the_tutorial_s(fields, given, expected):
    assert complete(TrainConfig(**fields), given) == expected


def test_hyperparameters_find_their_place(batch):
    """The same step as with the numbers written into model and optimizer; a name of both goes to the model."""
    traced = TrainConfig(model=TwoRates(), optimizer=lambda learning_rate, b2: optax.sgd(learning_rate, momentum=b2))
    numbers = {"first": 0.9, "second": 0.0, "b1": 0.25, "b2": 0.5, "learning_rate": 0.1}
    model, _ = compose(traced, numbers)
    assert model == TwoRates(first=0.9, second=0.0, b1=0.25)
    fixed = TrainConfig(model=model, optimizer=lambda: optax.sgd(0.1, momentum=0.5))
    state, expected = init_state(KEY, config=traced, **numbers), init_state(KEY, config=fixed)
    for _ in range(2):
        state, metrics = train_step(state, batch, KEY, config=traced, **numbers)
        expected, expected_metrics = train_step(expected, batch, KEY, config=fixed)
        np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), state, expected)
    # An evaluation needs no numbers of the optimizer, whose b2 has no default.
    assert jax.eval_shape(functools.partial(evaluate, config=traced), state.params, batch).loss.shape == ()


def test_another_value_changes_the_step_and_compiles_nothing(batch):
    names = ["learning_rate", "dropout_rate", "b1", "b2", "eps", "weight_decay"]
    losses, programs = set(), set()
    for name in (None, *names):
        # An equal config, made anew.
        config = TrainConfig(model=FashionMLP(hidden=(16,)), optimizer=optax.adamw)
        numbers = dict.fromkeys(names, 0.1) | ({name: 0.2} if name else {})
        state = init_state(KEY, config=config, **numbers)
        for _ in range(2):
            state, _ = train_step(state, batch, KEY, config=config, **numbers)
        state, metrics = train_step(state, batch, KEY, config=config, **numbers)
        train_epoch(state, batch, KEY, config=config, **numbers)
        losses.add(float(metrics.loss))
        programs.add((init_state._cache_size(), train_step._cache_size(), train_epoch._cache_size()))
    assert (len(losses), len(programs)) == (len(names) + 1, 1)
