import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fashion_jax import TrainConfig
from fashion_jax.optimiser import build_optimiser


def adam_in_float64(gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """The paper's algorithm 1, line by line."""
    position = first = second = 0.0
    for t, gradient in enumerate(gradients.astype(np.float64), start=1):
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        position = position - learning_rate * (first / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + eps)
        yield position


@pytest.fixture
def gradients():
    # From far below eps to far above it.
    return (np.random.default_rng(0).standard_normal((2000, 9)) * 10.0 ** np.arange(-12, 6, 2)).astype(np.float32)


def walk(transformation, gradients):
    @jax.jit
    def step(carry, gradient):
        position, state = carry
        update, state = transformation.update(gradient, state)
        position = optax.apply_updates(position, update)
        return (position, state), position

    start = jnp.zeros(gradients.shape[1])
    return jax.lax.scan(step, (start, transformation.init(start)), gradients)


def test_adam_agrees_with_the_paper_in_float64(gradients):
    (_, state), ours = walk(build_optimiser(TrainConfig(learning_rate=0.003)), gradients)
    exact = np.stack(list(adam_in_float64(gradients, 0.003)))
    np.testing.assert_allclose(ours[0], exact[0], rtol=1e-6)
    np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=2e-6)
    assert int(state[0].count) == len(gradients)


def test_the_first_step_is_closer_to_the_paper_than_optax_adam(gradients):
    """Why there is an Adam of our own; when optax's is as close, it can go."""
    exact = next(adam_in_float64(gradients, 0.003))

    def off(transformation):
        _, positions = walk(transformation, gradients[:1])
        return np.abs(positions[0] / exact - 1).max()

    assert off(build_optimiser(TrainConfig())) < 1e-6
    assert off(optax.adam(0.003)) > 3e-6


def test_adam_keeps_the_state_of_optax():
    state = build_optimiser(TrainConfig()).init({"bias": jnp.zeros(3)})
    assert isinstance(state[0], optax.ScaleByAdamState)
