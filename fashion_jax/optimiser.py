"""The optimiser: optax's parts, put together as the config says."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from fashion_jax.config import TrainConfig


class AverageState(NamedTuple):
    """The state of `average_params`.

    Attributes:
        step: Steps taken.
        average: The averaged parameters.
    """

    step: Int[Array, ""]
    average: Any


def build_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Build the optimiser that a config asks for; what is off has no part in it.

    >>> state = build_optimiser(TrainConfig()).init({"kernel": jnp.zeros((2, 3))})
    >>> state[0].mu["kernel"].shape
    (2, 3)
    """
    learning_rate = schedule(config)
    if config.optimiser is None:
        parts = [scale_by_adam()]
        if config.weight_decay:
            parts.append(optax.add_decayed_weights(config.weight_decay, mask=_kernels))
        parts.append(optax.scale_by_learning_rate(learning_rate))
    else:
        parts = [config.optimiser(learning_rate)]
        if not hasattr(parts[0], "init") or not hasattr(parts[0], "update"):
            raise TypeError(f"config.optimiser must give an optax.GradientTransformation, got {parts[0]!r}")
    if config.max_norm is not None:
        parts.append(limit_norms(config.max_norm))
    if config.average_decay is not None:
        parts.append(average_params(config.average_decay))
    return optax.chain(*parts)


def schedule(config: TrainConfig) -> float | optax.Schedule:
    """Give a config's learning rate: a number, or a function of the number of steps taken.

    >>> rate = schedule(TrainConfig(learning_rate=0.1, warmup_steps=10, decay_steps=30))
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 20, 30, 40)]
    [0.0, 0.05, 0.1, 0.05, 0.0, 0.0]
    """
    if config.decay_steps is not None:
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.decay_steps)
    if config.warmup_steps:
        return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return config.learning_rate


def limit_norms(max_norm: float) -> optax.GradientTransformation:
    """Scale back the weights that lead to a unit if, after the update, their Euclidean norm is above a limit.

    It comes last of what changes the update. A kernel's last axis is taken for that of the units, as `flax.linen.Dense`
    and `flax.linen.Conv` have it; biases, and what has a single axis, are left alone.

    Args:
        max_norm: The limit.

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15 (2014),
    section 5.1, "max-norm regularization".

    >>> limit = limit_norms(2.0)
    >>> params = jnp.array([[3.0, 0.6], [4.0, 0.8]])
    >>> updates, _ = limit.update(jnp.zeros((2, 2)), limit.init(params), params)
    >>> bool(jnp.allclose(params + updates, jnp.array([[1.2, 0.6], [1.6, 0.8]])))
    True
    """

    def limited(path, update, param):
        if not _is_kernel(path, param):
            return update
        new = param + update
        norms = jnp.sqrt(jnp.square(new).sum(axis=tuple(range(new.ndim - 1)), keepdims=True))
        return new * jnp.minimum(1, max_norm / jnp.maximum(norms, 1e-30)) - param

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(limited, updates, params))


def average_params(decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the parameters, and change no update; it comes last.

    Early on, when the average would still be made of the initial weights, a lower decay is used: (1 + t) / (10 + t)
    after t steps, if that is less.

    Args:
        decay: Weight of the average in the next average, in [0, 1).

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, in its exponential form;
    the lower decay at the start is that of TensorFlow's `ExponentialMovingAverage`.

    >>> average = average_params(0.5)
    >>> state = average.init(jnp.array(0.0))
    >>> _, state = average.update(jnp.array(1.0), state, jnp.array(0.0))
    >>> round(float(state.average), 4)
    0.9
    """

    def init(params):
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params))

    def update(updates, state, params=None):
        t = state.step.astype(jnp.result_type(float))
        weight = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p, u: a + weight * (p + u - a), state.average, params, updates)
        return updates, AverageState(state.step + 1, average)

    return optax.GradientTransformation(init, update)


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Scale gradients as Adam does, with exact bias corrections.

    `optax.scale_by_adam` takes 1 - b**t from b**t in float32, where 1 - 0.999 is off by 1.3e-5. That shrinks all early
    updates alike, and two networks that differ so are soon different networks. It also divides both moments by their
    corrections, element by element; here the corrections meet in factors of a step, and one division is left of three.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the corrected second moment.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1 in the more efficient
    order that follows it.

    >>> adam = scale_by_adam()
    >>> gradient = jnp.array([0.5, -2.0])
    >>> update, state = adam.update(gradient, adam.init(gradient))
    >>> [f"{value:.5f}" for value in update]
    ['1.00000', '-1.00000']
    """

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: m + (1 - b1) * (g - m), state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        correction1, correction2 = (-jnp.expm1(count * math.log(b)) for b in (b1, b2))
        root = jnp.sqrt(correction2)
        updates = jax.tree.map(lambda m, v: root / correction1 * (m / (jnp.sqrt(v) + eps * root)), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _kernels(params):
    return jax.tree_util.tree_map_with_path(_is_kernel, params)


def _is_kernel(path, leaf) -> bool:
    # A layer whose units have several axes, such as attention, has biases of several.
    return leaf.ndim > 1 and jax.tree_util.keystr(path[-1:], simple=True) != "bias"
