"""The numbers are those of independent programs: the formulas in float64 NumPy, and PyTorch with the same masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest

from fashion_jax.config import TrainConfig
from fashion_jax.interop import torch_adam
from fashion_jax.model import FashionMLP
from fashion_jax.steps import eval_step, evaluate, init_state, train_step
from fashion_jax.types import Batch

KEY = jax.random.key(0)


@pytest.mark.parametrize("optimizer", [optax.adam, torch_adam])
def test_loss_gradient_and_adam_equal_numpy(small, optimizer):
    """Kingma and Ba, algorithm 1, line by line."""
    config, batch = TrainConfig(model=FashionMLP((32, 16)), optimizer=optimizer), Batch(*(leaf[:64] for leaf in small))
    b1, b2, eps, rate = 0.8, 0.99, 1e-6, 0.01
    with jax.enable_x64(True):
        state = init_state(KEY, config=config)
        params, first, second = parity.flat(state.params), 0.0, 0.0
        for t in range(1, 6):
            loss, log_probs, gradient = parity.loss_and_gradient(state.params, batch)
            gradient = parity.flat(gradient())
            first = b1 * first + (1 - b1) * gradient
            second = b2 * second + (1 - b2) * gradient**2
            params = params - rate * first / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + eps)
            state, metrics = train_step(state, batch, KEY, config=config, b1=b1, b2=b2, eps=eps, learning_rate=rate)
            assert float(metrics.loss) == pytest.approx(loss, rel=1e-12)
            assert float(metrics.accuracy) == (log_probs.argmax(axis=1) == batch.labels).mean()
            np.testing.assert_allclose(parity.flat(state.params), params, rtol=0, atol=1e-10)


def test_an_evaluation_of_60_000_images_equals_numpy(splits):
    """Catches a jaxlib that miscompiles reductions, such as 0.10.2."""
    params = init_state(KEY).params
    loss, log_probs, _ = parity.loss_and_gradient(params, splits.train)
    found = FashionMLP().apply({"params": params}, jnp.array(splits.train.images), deterministic=True)
    np.testing.assert_allclose(found, log_probs, atol=1e-5)
    correct = (log_probs.argmax(axis=1) == splits.train.labels).sum()
    metrics = evaluate(params, splits.train)
    assert float(metrics.loss) == pytest.approx(loss, rel=2e-6)
    # Two classes equal within rounding may change places.
    assert float(metrics.accuracy) * 60_000 == pytest.approx(correct, abs=2)
    assert float(eval_step(params, splits.train).loss) == pytest.approx(loss, rel=2e-5)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_free_running_float64_training_equals_pytorch(splits, rate):
    with jax.enable_x64(True):
        apart = parity.compare(splits, rate, steps=300, optimizer=optax.adam, lockstep=False)
    assert all(apart[name].max() < 1e-10 for name in ("loss", "accuracy", "parameters", "evaluation"))


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(("optimizer", "bound"), [(torch_adam, 1e-6), (optax.adam, 2e-5)])
def test_float32_steps_from_the_same_state_equal_pytorch(splits, rate, optimizer, bound):
    """`optax.adam` rounds its bias corrections, which changes an update by up to 1.3e-5 of its length.

    Adam divides rounding by rounding where a gradient is all but 0, most of all in its first step, and a unit whose
    input is 0 within rounding may be on in one program and off in the other; so some steps differ by more.
    """
    apart = parity.compare(splits, rate, steps=100, optimizer=optimizer, lockstep=True)
    assert apart["loss"].max() < 1e-6
    assert np.median(apart["update"]) < bound
    assert np.quantile(apart["parameters"], 0.9) < 1e-6
    # One of 10,000 images may be a tie within rounding.
    assert (apart["evaluation"] < [1e-6, 1.5e-4]).all()
