import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fashion_jax import TrainConfig
from fashion_jax.optimiser import AverageState, build_optimiser, limit_norms, schedule


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


def test_decoupled_weight_decay_is_torchs_adamw():
    config = TrainConfig(learning_rate=0.01, weight_decay=0.3)
    transformation = build_optimiser(config)
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.array(rng.standard_normal((4, 3)), jnp.float32), "bias": jnp.ones(3)}
    theirs = {name: torch.nn.Parameter(torch.tensor(np.array(leaf))) for name, leaf in params.items()}
    decays = {"kernel": 0.3, "bias": 0.0}
    groups = [{"params": [tensor], "weight_decay": decays[name]} for name, tensor in theirs.items()]
    adamw = torch.optim.AdamW(groups, lr=0.01)
    state = transformation.init(params)
    for _ in range(50):
        gradient = {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in params.items()}
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for name, tensor in theirs.items():
            tensor.grad = torch.tensor(gradient[name])
        adamw.step()
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, theirs[name].detach().numpy(), rtol=2e-5, atol=1e-6)


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(learning_rate=0.5, warmup_steps=100, decay_steps=1_000)
    steps = np.arange(1_200)
    expected = np.where(steps < 100, steps / 100, (1 + np.cos(np.pi * (steps - 100) / 900)) / 2) * 0.5
    expected[1_000:] = 0
    rate = schedule(config)
    assert callable(rate)
    np.testing.assert_allclose(jax.vmap(rate)(steps), expected, atol=1e-6)
    only_warm = schedule(TrainConfig(learning_rate=0.5, warmup_steps=100))
    assert callable(only_warm)
    np.testing.assert_allclose(jax.vmap(only_warm)(steps), np.minimum(steps / 100, 1) * 0.5, atol=1e-6)


@pytest.mark.parametrize("optimiser", [None, optax.sgd])
def test_no_norm_is_above_its_limit_after_a_step(optimiser):
    transformation = build_optimiser(TrainConfig(learning_rate=1.0, max_norm=3.0, optimiser=optimiser))
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.array(rng.standard_normal((5, 40)), jnp.float32), "bias": 9 * jnp.ones(40)}
    gradient = {"kernel": jnp.array(rng.standard_normal((5, 40)), jnp.float32), "bias": jnp.zeros(40)}
    free = build_optimiser(TrainConfig(learning_rate=1.0, optimiser=optimiser))
    after, unlimited = (
        optax.apply_updates(params, one.update(gradient, one.init(params), params)[0]) for one in (transformation, free)
    )
    unlimited = np.asarray(unlimited["kernel"], np.float64)
    norms = np.linalg.norm(unlimited, axis=0)
    assert (norms > 3).any()
    assert (norms < 3).any()
    np.testing.assert_allclose(after["kernel"], unlimited * np.minimum(1, 3 / norms), atol=1e-5)
    np.testing.assert_array_equal(after["bias"], params["bias"])


def test_the_average_is_that_of_the_steps_recursion():
    transformation = build_optimiser(TrainConfig(learning_rate=0.1, average_decay=0.9, optimiser=optax.sgd))
    position, expected, average = jnp.array(1.0), 1.0, 1.0
    state = transformation.init(position)
    for t in range(200):
        updates, state = transformation.update(jnp.array(0.5), state, position)
        position = optax.apply_updates(position, updates)
        expected -= 0.05
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * expected
    assert isinstance(state[-1], AverageState)
    assert float(state[-1].average) == pytest.approx(average, abs=1e-4)


def test_what_is_no_optimiser_is_refused():
    config = TrainConfig(optimiser=lambda learning_rate: learning_rate)
    with pytest.raises(TypeError, match=r"config\.optimiser must give an optax\.GradientTransformation, got 0\.003"):
        build_optimiser(config)


def test_the_norm_of_a_convolution_is_that_of_all_that_leads_to_a_unit():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 4)).astype(np.float32)
    limit = limit_norms(1.0)
    updates, _ = limit.update(jnp.zeros(kernel.shape), limit.init(kernel), jnp.array(kernel))
    norms = np.linalg.norm(kernel.reshape(-1, 4), axis=0)
    np.testing.assert_allclose(kernel + np.asarray(updates), kernel / np.maximum(norms, 1), atol=1e-6)


def test_the_average_is_that_of_the_limited_weights():
    config = TrainConfig(learning_rate=1.0, max_norm=1.0, average_decay=0.5, optimiser=optax.sgd)
    transformation = build_optimiser(config)
    kernel = 3 * jnp.ones((4, 2))
    updates, state = transformation.update(jnp.ones_like(kernel), transformation.init(kernel), kernel)
    np.testing.assert_allclose(optax.apply_updates(kernel, updates), 0.5, atol=1e-6)
    # After the first step the old average has a weight of 1/10.
    np.testing.assert_allclose(state[-1].average, 0.1 * 3 + 0.9 * 0.5, atol=1e-6)


def test_biases_of_several_axes_are_no_kernels():
    """Attention has them: one axis for the heads."""
    params = {"query": {"kernel": 3 * jnp.ones((4, 2, 2)), "bias": 3 * jnp.ones((2, 2))}}
    nothing = jax.tree.map(jnp.zeros_like, params)
    limit = limit_norms(1.0)
    updates, _ = limit.update(nothing, limit.init(params), params)
    assert not updates["query"]["bias"].any()
    assert updates["query"]["kernel"].all()
    decayed = build_optimiser(TrainConfig(weight_decay=0.1))
    updates, _ = decayed.update(nothing, decayed.init(params), params)
    assert not updates["query"]["bias"].any()
    assert updates["query"]["kernel"].all()
