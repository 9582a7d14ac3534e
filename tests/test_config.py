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
    """A rate for each layer, a size, a switch, and a name that optimizers have, too."""

    width: int = 32
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


def two_numbers(learning_rate, momentum):
    return optax.sgd(optax.linear_schedule(learning_rate, 0.0, 5), momentum)


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


@pytest.mark.parametrize(
    ("fields", "name", "exist"),
    [
        ({}, "lr", "the model has dropout_rate; the optimizer has learning_rate, b1, b2, eps, eps_root"),
        ({}, "classes", "the model has dropout_rate;"),
        ({}, "nesterov", "the model has dropout_rate;"),
        ({"model": TwoRates()}, "width", "the model has first, second, b1; the optimizer"),
        ({"optimizer": lambda: optax.sgd(0.1)}, "learning_rate", "the model has dropout_rate; the optimizer has none"),
    ],
)
def test_unknown_names_raise_and_list_those_that_exist(fields, name, exist):
    with pytest.raises(TypeError, match=f"there is no hyperparameter '{name}'; {exist}"):
        init_state(KEY, config=TrainConfig(**fields), **{name: 1.0})


def test_numbers_without_default_and_postponed_annotations_are_no_obstacle(batch):
    config = TrainConfig(optimizer=two_numbers)
    state = init_state(KEY, config=config, momentum=0.9)
    assert np.isfinite(evaluate(state.params, batch, config=config).loss)
    module = {"TwoRates": TwoRates}
    exec("from __future__ import annotations\nclass Later(TwoRates): size: int = 3; third: float = 0.0", module)
    assert complete(TrainConfig(model=module["Later"]()), {}).keys() - RATE == {"first", "second", "b1", "third"}


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [(optax.adamw, ["dropout_rate", "learning_rate", "b1", "b2", "eps", "weight_decay"]), (two_numbers, ["momentum"])],
)
def test_another_value_changes_the_step_and_compiles_nothing(batch, optimizer, names):
    numbers = dict.fromkeys(["learning_rate", *names], 0.1)
    losses, programs = set(), set()
    for name in (None, *names):
        # An equal config, made anew.
        config = TrainConfig(model=FashionMLP(hidden=(16, 8)), optimizer=optimizer)
        changed = numbers | ({name: 0.2} if name else {})
        state = init_state(KEY, config=config, **changed)
        for _ in range(2):
            state, _ = train_step(state, batch, KEY, config=config, **changed)
        _, metrics = train_step(state, batch, KEY, config=config, **changed)
        train_epoch(state, batch, KEY, config=config, **changed)
        losses.add(float(metrics.loss))
        programs.add((init_state._cache_size(), train_step._cache_size(), train_epoch._cache_size()))
    assert len(losses) == len(names) + 1
    assert len(programs) == 1


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"optimizer": optax.adam(1e-3)}, TypeError, "optimizer must be a factory, got the transformation"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a function, got 0.1"),
        (
            {"model": FashionMLP},
            TypeError,
            r"model must be a flax.linen.Module such as Fash.*; got <class",
        ),
        ({"model": TwoRates(width=[8])}, TypeError, "every field must be hashable, such as a tuple in place of a list"),
        ({"loss": None}, TypeError, "loss must be a function, got None"),
        ({"augment": "flip"}, TypeError, "augment must be a function, got 'flip'"),
        ({"eval_params": 1}, TypeError, "eval_params must be a function, got 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 64.0}, TypeError, "batch_size must be an integer, got 64.0"),
        ({"batch_size": None}, TypeError, "batch_size must be an integer, got None"),
        ({"eval_batch_size": True}, TypeError, "eval_batch_size must be an integer, got True"),
        ({"train_eval_size": -1}, ValueError, "train_eval_size must be at least 1, got -1"),
    ],
)
def test_bad_fields_are_named(fields, error, message, unchecked):
    with pytest.raises(error, match=message):
        TrainConfig(**fields)
