"""The calculus: pure, jitted functions from a state and data to the next state and metrics. Inputs are trusted."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from fashion_jax import _checks
from fashion_jax.config import TrainConfig, compose, compose_model, negative_log_likelihood
from fashion_jax.types import Batch, Metrics, Params, TrainState

Number = float | Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("config", "image_shape"))
def init_state(
    key: Key[Array, ""],
    *,
    config: TrainConfig = TrainConfig(),
    image_shape: tuple[int, ...] = (28, 28),
    **hyperparameters: Number,
) -> TrainState:
    """Initialize a run's parameters and optimizer state.

    Args:
        key: The run's key, as for `fit`.
        config, image_shape: Static.
        **hyperparameters: Numbers of the model and the optimizer, traced: other values compile nothing.

    >>> state = init_state(jax.random.key(0))
    >>> state.params["fc1"]["kernel"].shape, int(state.step)
    ((784, 256), 0)
    """
    model, optimizer = compose(config, hyperparameters)
    init_key, _, _ = jax.random.split(key, 3)
    variables: Any = model.init(init_key, jnp.zeros((1, *image_shape), jnp.uint8), deterministic=True)
    params = variables["params"]
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames="config")
def train_epoch(
    state: TrainState,
    train: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig = TrainConfig(),
    **hyperparameters: Number,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """Train on every example once, in a new random order, as one program.

    Args:
        state: The state between two epochs; its step determines the epoch's order and masks.
        train: n training examples.
        key: The run's key, as for `fit`.
        config: Static.
        **hyperparameters: Traced.

    Returns:
        The state ceil(n / batch_size) steps later, and each batch's loss.

    >>> train = Batch(jnp.zeros((5, 28, 28), jnp.uint8), jnp.arange(5))
    >>> state, losses = train_epoch(init_state(jax.random.key(0)), train, jax.random.key(0))
    >>> int(state.step), losses.shape
    (1, (1,))
    """
    n = len(train.labels)
    epoch = state.step // -(-n // config.batch_size)
    order_key, dropout_key = (jax.random.fold_in(key, epoch) for key in jax.random.split(key, 3)[1:])
    # One sort; jax.random.permutation sorts twice to break ties.
    indices, weights = _split(jnp.argsort(jax.random.bits(order_key, (n,))), n, config.batch_size)

    def step(state, inputs):
        indices, weights, key = inputs
        batch = jax.tree.map(lambda leaf: leaf[indices], train)
        state, metrics = train_step(state, batch, key, config=config, weights=weights, **hyperparameters)
        return state, metrics.loss

    return jax.lax.scan(step, state, (indices, weights, jax.random.split(dropout_key, len(indices))))


@functools.partial(jax.jit, static_argnames="config")
def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig = TrainConfig(),
    weights: Float[Array, " n"] | None = None,
    **hyperparameters: Number,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step on the mean loss of a batch, dropout on.

    Args:
        state: The state before the step.
        batch: n examples.
        key: The step's key, for dropout and augmentation.
        config: Static.
        weights: Weight of each example in the mean, 0 for padding; all 1 by default.
        **hyperparameters: Traced.

    Returns:
        The next state, and the batch's training loss and accuracy under the old parameters.

    >>> batch = Batch(jnp.zeros((4, 28, 28), jnp.uint8), jnp.arange(4))
    >>> state, metrics = train_step(init_state(jax.random.key(0)), batch, jax.random.key(1), dropout_rate=0.2)
    >>> int(state.step), metrics.loss.shape
    (1, ())
    """
    model, optimizer = compose(config, hyperparameters)
    images = batch.images if config.augment is None else config.augment(jax.random.fold_in(key, 1), batch.images)

    def loss_fn(params):
        log_probs: Any = model.apply({"params": params}, images, deterministic=False, rngs={"dropout": key})
        metrics = _average(config.loss(log_probs, batch.labels), log_probs, batch.labels, weights)
        return metrics.loss, metrics

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
    return TrainState(cast(Params, optax.apply_updates(state.params, updates)), opt_state, state.step + 1), metrics


@functools.partial(jax.jit, static_argnames="config")
def evaluate(
    params: Params, batch: Batch, *, config: TrainConfig = TrainConfig(), **hyperparameters: Number
) -> Metrics:
    """Compute loss and accuracy on a data set of any size, dropout off, every example counted once.

    Args:
        params: The model's parameters; leaves may have lane axes in front, such as those of a `Sweep`.
        batch: n examples, evaluated `config.eval_batch_size` at a time.
        config: Static.
        **hyperparameters: Fields of the model that matter with dropout off too, traced; others have no effect.

    Returns:
        Metrics with the lane axes of `params`.

    >>> batch = Batch(jnp.zeros((5, 28, 28), jnp.uint8), jnp.arange(5))
    >>> params = init_state(jax.random.key(0)).params
    >>> two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    >>> evaluate(two, batch, config=TrainConfig(eval_batch_size=2)).loss.shape
    (2,)
    """
    n = len(batch.labels)
    chunks = _split(batch, n, config.eval_batch_size)

    def evaluate_one(params):
        def total(chunk):
            rows, weights = chunk
            metrics = eval_step(params, rows, config=config, weights=weights, **hyperparameters)
            return jax.tree.map(lambda mean: mean * weights.sum(), metrics)

        return jax.tree.map(lambda totals: totals.sum() / n, jax.lax.map(total, chunks))

    over_lanes = evaluate_one
    for _ in range(_checks.params(params, _checks.param_shapes(config.model, batch.images.shape[1:]))):
        over_lanes = functools.partial(jax.lax.map, over_lanes)
    return over_lanes(params)


@functools.partial(jax.jit, static_argnames="config")
def eval_step(
    params: Params,
    batch: Batch,
    *,
    config: TrainConfig = TrainConfig(),
    weights: Float[Array, " n"] | None = None,
    **hyperparameters: Number,
) -> Metrics:
    """Compute loss and accuracy on one batch, dropout off.

    Args:
        params, config, hyperparameters: As for `evaluate`.
        batch: n examples.
        weights: As for `train_step`.

    >>> batch = Batch(jnp.zeros((4, 28, 28), jnp.uint8), jnp.arange(4))
    >>> eval_step(init_state(jax.random.key(0)).params, batch).loss.shape
    ()
    """
    model = compose_model(config, hyperparameters)
    log_probs: Any = model.apply({"params": params}, batch.images, deterministic=True)
    return _average(negative_log_likelihood(log_probs, batch.labels), log_probs, batch.labels, weights)


def _average(losses: Any, log_probs: Any, labels: Any, weights: Float[Array, " n"] | None) -> Metrics:
    correct = log_probs.argmax(axis=1) == jnp.asarray(labels, int)
    # A model may return half precision, in which a mean over a data set would be coarse.
    values = (losses.astype(jnp.result_type(float)), correct.astype(jnp.result_type(float)))
    return Metrics(*(jnp.average(value, weights=weights) for value in values))


def _split(tree: Any, n: int, size: int) -> tuple[Any, Float[Array, "batches size"]]:
    """Split leaves [n, ...] into batches; padding repeats the last row with weight 0, so that no image is made up."""
    size = min(size, n)
    padding = -n % size

    def split(leaf, mode):
        widths = [(0, padding)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, widths, mode).reshape(-1, size, *leaf.shape[1:])

    weights = split(jnp.ones(n, jnp.result_type(float)), "constant")
    return jax.tree.map(lambda leaf: split(leaf, "edge"), tree), weights
