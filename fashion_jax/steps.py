"""Pure, jitted functions that map a state and data to the next state and metrics. Inputs are trusted."""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from fashion_jax import _convolution, _model_checks
from fashion_jax.config import TrainConfig, negative_log_likelihood
from fashion_jax.hyperparameters import compose, compose_model
from fashion_jax.types import Batch, Measured, Metrics, Params, Trained, TrainState, variables

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
        **hyperparameters: Numbers of the model and the optimizer, traced, so changing a value does not recompile.

    >>> state = init_state(jax.random.key(0))
    >>> state.params["fc1"]["kernel"].shape, int(state.step)
    ((784, 256), 0)
    """
    model, optimizer = compose(config, hyperparameters)
    init_key, _, _ = jax.random.split(key, 3)
    collections: Any = model.init(init_key, jnp.zeros((1, *image_shape), jnp.uint8), deterministic=True)
    params = collections.pop("params")
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), collections)


@functools.partial(jax.jit, static_argnames="config")
def train_epoch(
    state: TrainState,
    train: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig = TrainConfig(),
    **hyperparameters: Number,
) -> tuple[TrainState, Any]:
    """Train on every example once, in a new random order, as one program.

    Args:
        state: The state between two epochs; its step determines the epoch's order and masks.
        train: n training examples.
        key: The run's key, as for `fit`.
        config: Static.
        **hyperparameters: Traced.

    Returns:
        The state ceil(n / batch_size) steps later, and each batch's loss, [steps]; with step metrics, a `Measured` in
        place of the losses.

    >>> train = Batch(jnp.zeros((5, 28, 28), jnp.uint8), jnp.arange(5))
    >>> state, losses = train_epoch(init_state(jax.random.key(0)), train, jax.random.key(0))
    >>> int(state.step), losses.shape
    (1, (1,))
    """
    n, size = len(train.labels), min(config.batch_size, len(train.labels))
    epoch = state.step // -(-n // size)
    order_key, dropout_key = (jax.random.fold_in(key, epoch) for key in jax.random.split(key, 3)[1:])
    # One sort; jax.random.permutation sorts twice to break ties.
    order = jnp.argsort(jax.random.bits(order_key, (n,)))
    keys = jax.random.split(dropout_key, -(-n // size))
    # A short last batch is padded. Statistics of a batch must not see padding: there it is a step of its own.
    scanned = n - n % size if state.collections else n
    indices, weights = _split(order[:scanned], scanned, size)

    def step(state, inputs):
        indices, weights, key = inputs
        batch = jax.tree.map(lambda leaf: leaf[indices], train)
        state, metrics = train_step(state, batch, key, config=config, weights=weights, **hyperparameters)
        return state, metrics if isinstance(metrics, Measured) else metrics.loss

    state, metrics = jax.lax.scan(step, state, (indices, weights, keys[: len(indices)]))
    if scanned < n:
        state, last = step(state, (order[scanned:], None, keys[-1]))
        metrics = jax.tree.map(jnp.append, metrics, last)
    return state, metrics


@functools.partial(jax.jit, static_argnames="config")
def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig = TrainConfig(),
    weights: Float[Array, " n"] | None = None,
    **hyperparameters: Number,
) -> tuple[TrainState, Metrics | Measured]:
    """Train for one optimizer step on the mean loss of a batch, dropout on.

    Args:
        state: The state before the step.
        batch: n examples.
        key: The step's key, for dropout and augmentation.
        config: Static.
        weights: Weight of each example in the mean, 0 for padding; all 1 by default.
        **hyperparameters: Traced.

    Returns:
        The next state, and the batch's training loss and accuracy under the old parameters, with the step metrics of
        `config.metrics`.

    >>> batch = Batch(jnp.zeros((4, 28, 28), jnp.uint8), jnp.arange(4))
    >>> state, metrics = train_step(init_state(jax.random.key(0)), batch, jax.random.key(1), dropout_rate=0.2)
    >>> int(state.step), metrics.loss.shape
    (1, ())
    """
    model, optimizer = compose(config, hyperparameters)
    images = batch.images if config.augment is None else config.augment(jax.random.fold_in(key, 1), batch.images)

    def loss_fn(params):
        options: Any = {"deterministic": False, "rngs": {"dropout": key}, "mutable": list(state.collections)}
        with nn.intercept_methods(_convolution.in_every_layer):
            log_probs, collections = model.apply({"params": params, **state.collections}, images, **options)
        metrics = _average(config.loss(log_probs, batch.labels), log_probs, batch.labels, weights)
        return metrics.loss, (metrics, collections)

    (loss, (metrics, collections)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)

    def value(params, obj_fn=None):
        return loss_fn(params)[0]

    # What line searches and estimates of curvature ask for; the former insist that `value_fn` takes the rest.
    asked = {"value": loss, "grad": grads, "value_fn": value, "obj_fn": value}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **asked)
    params = cast(Params, optax.apply_updates(state.params, updates))
    state = TrainState(params, opt_state, state.step + 1, collections)
    return state, config.measure(metrics, grads=grads, updates=updates)


@functools.partial(jax.jit, static_argnames="config")
def evaluate(
    params: Trained, batch: Batch, *, config: TrainConfig = TrainConfig(), **hyperparameters: Number
) -> Metrics | Measured:
    """Compute loss, accuracy and `config.metrics` on a data set of any size, dropout off, every example counted once.

    Args:
        params: The state or the best of a run, or its parameters alone, if the model has no other variables. Leaves
            may have lane axes in front, such as those of a `Sweep`.
        batch: n examples, of which the model sees `config.eval_batch_size` at a time.
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

    def evaluate_one(variables):
        def on_chunk(chunk):
            rows, weights = chunk
            log_probs = _log_probs(variables, rows.images, config, hyperparameters)
            metrics = _average(negative_log_likelihood(log_probs, rows.labels), log_probs, rows.labels, weights)
            return jax.tree.map(lambda mean: mean * weights.sum(), metrics), log_probs

        totals, log_probs = jax.lax.map(on_chunk, chunks)
        log_probs = log_probs.reshape(-1, log_probs.shape[-1])[:n]
        metrics = jax.tree.map(lambda total: total.sum() / n, totals)
        return config.measure(metrics, log_probs=log_probs, labels=batch.labels)

    over_lanes, found = evaluate_one, variables(params)
    for _ in range(_model_checks.variables(found, _model_checks.variable_shapes(config.model, batch.images.shape[1:]))):
        over_lanes = functools.partial(jax.lax.map, over_lanes)
    return over_lanes(found)


@functools.partial(jax.jit, static_argnames="config")
def eval_step(
    params: Trained,
    batch: Batch,
    *,
    config: TrainConfig = TrainConfig(),
    weights: Float[Array, " n"] | None = None,
    **hyperparameters: Number,
) -> Metrics:
    """Compute loss and accuracy on one batch, dropout off.

    Args:
        params, config, hyperparameters: As for `evaluate`, without lane axes.
        batch: n examples.
        weights: As for `train_step`.

    >>> batch = Batch(jnp.zeros((4, 28, 28), jnp.uint8), jnp.arange(4))
    >>> eval_step(init_state(jax.random.key(0)).params, batch).loss.shape
    ()
    """
    log_probs = _log_probs(variables(params), batch.images, config, hyperparameters)
    return _average(negative_log_likelihood(log_probs, batch.labels), log_probs, batch.labels, weights)


def _log_probs(variables: Any, images: Any, config: TrainConfig, hyperparameters: Any) -> Any:
    return compose_model(config, hyperparameters).apply(variables, images, deterministic=True)


def _average(losses: Any, log_probs: Any, labels: Any, weights: Float[Array, " n"] | None) -> Metrics:
    def average(values):
        # A model may return half precision, in which a mean over a data set would be coarse.
        return jnp.average(values.astype(jnp.result_type(float)), weights=weights)

    return Metrics(average(losses), average(log_probs.argmax(axis=1) == jnp.asarray(labels, int)))


def _split(tree: Any, n: int, size: int) -> tuple[Any, Float[Array, "batches size"]]:
    """Split leaves [n, ...] into batches; padding repeats the last row with weight 0, so that no image is made up."""
    size = min(size, n)
    padding = -n % size

    def split(leaf, mode):
        widths = [(0, padding)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, widths, mode).reshape(-1, size, *leaf.shape[1:])

    weights = split(jnp.ones(n, jnp.result_type(float)), "constant")
    return jax.tree.map(lambda leaf: split(leaf, "edge"), tree), weights
