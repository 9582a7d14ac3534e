"""The optimiser: optax's parts, put together as the config says."""

import math

import jax
import jax.numpy as jnp
import optax

from fashion_jax.config import TrainConfig


def build_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Build the optimiser that a config asks for.

    >>> state = build_optimiser(TrainConfig()).init({"kernel": jnp.zeros((2, 3))})
    >>> state[0].mu["kernel"].shape
    (2, 3)
    """
    return optax.chain(scale_by_adam(), optax.scale_by_learning_rate(config.learning_rate))


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
