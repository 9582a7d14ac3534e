"""Training: one step, one epoch, one run.

Everything is a pure function of its arguments. A run is determined by its key, its data, its `TrainConfig` and its
dropout rate; the key is split once into three streams (initial weights, batch order, dropout), and the epoch and step
numbers are folded in, so that a run can go on from nothing but its seed and its state.
"""

import contextlib
import functools
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from fashion_jax.augment import augment
from fashion_jax.checkpoint import Checkpoints, Store, content_digest
from fashion_jax.config import TrainConfig, check_config, check_count
from fashion_jax.data import Batch, check_batch, check_key, subset
from fashion_jax.model import (
    Params,
    build_model,
    check_log_probabilities,
    check_params,
    check_rate,
    draw_masks,
    init_params,
)
from fashion_jax.optimiser import AverageState, build_optimiser
from fashion_jax.signals import noting_signals
from fashion_jax.threefry import bits

# Lanes that an error names one by one.
FEW_LANES = 4
logger: logging.Logger = logging.getLogger(__name__)


class Metrics(NamedTuple):
    """Mean negative log likelihood in nats, and the share of examples whose most probable class is right.

    One type with growing axes: [] for one evaluation, [epochs] for a run, more in front for many runs.
    """

    loss: Float[Array | np.ndarray, "*axes"]
    accuracy: Float[Array | np.ndarray, "*axes"]


class History(NamedTuple):
    """What was measured after each epoch; every leaf has a last axis [epochs].

    Attributes:
        running_loss: The tutorial's training curve: mean of the batch losses while the weights move, dropout on.
        train: The fair training curve: weights at the end of the epoch, dropout off, on a fixed part of the training
            set.
        validation: The same on the validation set.
    """

    running_loss: Float[Array | np.ndarray, "*axes"]
    train: Metrics
    validation: Metrics


class TrainState(NamedTuple):
    """What training changes. There is no key inside: the seed and `step` tell which draws come next.

    Attributes:
        params: The model's parameters, {"fc1": {"kernel": [in, out], "bias": [out]}, ...}.
        opt_state: What the optimiser keeps, such as Adam's moments.
        step: Steps taken.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class Best(NamedTuple):
    """The parameters of the epoch with the lowest validation loss so far: what early stopping returns.

    Attributes:
        params: The model's parameters.
        loss: That validation loss, in nats; infinite before the first epoch.
    """

    params: Params
    loss: Float[Array | np.ndarray, "*axes"]


class Run(NamedTuple):
    """A trained state, how it came about, and the best that there was on the way.

    Attributes:
        state: After the last epoch.
        history: What was measured after each epoch, with a last axis [epochs].
        best: The parameters after the epoch of lowest validation loss.
    """

    state: TrainState
    history: History
    best: Best


class Lane(NamedTuple):
    """What a run carries from one epoch to the next."""

    state: TrainState
    best: Best


class Outcome(NamedTuple):
    """What one epoch of one lane tells.

    Attributes:
        history: The epoch's measures; all NaN if one was not finite, and from then on.
        good_steps: Steps before the first whose loss was not finite; all of them if there was none.
    """

    history: History
    good_steps: Int[Array | np.ndarray, "*axes"]


class NonFiniteLossError(FloatingPointError):
    """Training ran into a loss that is infinite or not a number.

    Attributes:
        epoch: The epoch in which it did, from 1.
        step: The step in that epoch, from 1; None if only the evaluation after the epoch was not finite. Of several
            lanes, the first one's that stopped in that epoch.
        run: The Run until the epoch before, or None if there was none.
    """

    epoch: int
    step: int | None
    run: Run | None

    def __init__(self, message: str, *, epoch: int, step: int | None, run: Run | None):
        super().__init__(message)
        self.epoch, self.step, self.run = epoch, step, run

    def __reduce__(self) -> tuple[Callable[[], "NonFiniteLossError"], tuple[()]]:
        return functools.partial(type(self), str(self), epoch=self.epoch, step=self.step, run=self.run), ()


class EpochEnd(NamedTuple):
    """What `fit` and `sweep` hand to `on_epoch`.

    Attributes:
        epoch: Number of the epoch that has ended, from 1.
        epochs: Number of epochs that were asked for.
        config: What is trained with.
        train_size: Number of training examples.
        dropout_rates: The rates that are trained; `fit` has one.
        seeds: The seeds of a `sweep`; None from `fit`, which has a key.
        history: What was measured; leaves are NumPy arrays, without axes from `fit`, [rates, seeds] from `sweep`.
        fetch_state: Brings the state after the epoch to the host, with the same axes in front. Of several processes
            all have to call it.
    """

    epoch: int
    epochs: int
    config: TrainConfig
    train_size: int
    dropout_rates: tuple[float, ...]
    seeds: tuple[int, ...] | None
    history: History
    fetch_state: Callable[[], TrainState]


OnEpoch = Callable[[EpochEnd], object]


class RunKeys(NamedTuple):
    """The three streams of random numbers of a run.

    Attributes:
        init: For the initial weights.
        order: For the order of the training examples, epoch by epoch.
        dropout: For the dropout masks, step by step.
    """

    init: Key[Array, ""]
    order: Key[Array, ""]
    dropout: Key[Array, ""]


def split_key(key: Key[Array, ""]) -> RunKeys:
    """Split a run's key into its three streams.

    Raises:
        TypeError: `key` is not one typed key.

    >>> split_key(jax.random.key(0)).dropout.shape
    ()
    """
    check_key(key)
    return RunKeys(*jax.random.split(key, 3))


def init_state(key: Key[Array, ""], *, config: TrainConfig = TrainConfig()) -> TrainState:
    """Draw the initial weights of a run and the optimiser's empty state.

    Args:
        key: The run's key, as `fit` takes it.
        config: Gives the widths and the optimiser.

    Raises:
        TypeError: `key` is not one typed key.

    >>> state = init_state(jax.random.key(0))
    >>> state.params["fc1"]["kernel"].shape, int(state.step)
    ((784, 256), 0)
    """
    check_key(key)
    check_config(config)
    return _init_state(key, config)


@functools.partial(jax.jit, static_argnames="config")
def _init_state(key, config):
    params = init_params(split_key(key).init, config)
    return TrainState(params, build_optimiser(config).init(params), jnp.zeros((), jnp.int32))


def negative_log_likelihood(
    log_probs: Float[Array, "n classes"], labels: Int[Array | np.ndarray, " n"]
) -> Float[Array, " n"]:
    """Take each example's negative log-probability of its label, in nats; NaN where the label names no class.

    >>> loss = negative_log_likelihood(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]))
    >>> f"{loss[0]:.4f}"
    '1.3863'
    """
    # A sum over the row picks the same number as an index, and its gradient needs no scatter: fewer kernels to compile.
    chosen = jnp.asarray(labels)[:, None] == jnp.arange(log_probs.shape[1])[None]
    return -jnp.where(chosen.any(axis=1), jnp.where(chosen, log_probs, 0).sum(axis=1), jnp.nan)


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig,
    dropout_rate: float | Float[Array, ""],
    weights: Float[Array, " n"] | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one step of the optimiser on the mean loss of a batch, dropout on.

    Args:
        state: Where training stands.
        batch: n examples.
        key: This step's key, for the dropout masks and the augmentation.
        config: Static.
        dropout_rate: Share of hidden units to drop; traced, so another rate compiles nothing.
        weights: Weight of each example in the mean; 0 for padding. All 1 if left out.

    Returns:
        The next state, and the batch's training loss and accuracy under the old weights and the drawn masks. A label
        that names no class makes the loss NaN: to look at the labels on the host would cost time at every step.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The rate is out of range, a shape is wrong, or the parameters do not fit the config.

    >>> config = TrainConfig()
    >>> batch = Batch(jnp.zeros((4, 28, 28), jnp.uint8), jnp.arange(4))
    >>> state = init_state(jax.random.key(0), config=config)
    >>> state, metrics = train_step(state, batch, jax.random.key(1), config=config, dropout_rate=0.2)
    >>> int(state.step), metrics.loss.shape
    (1, ())
    """
    dropout_rate = _check_step(key, config, dropout_rate)
    return _train_step(state, batch, key, weights, dropout_rate, {}, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _train_step(state, batch, key, weights, dropout_rate, masks, *, config):
    _check_state(state, config)
    _check_data(batch, "batch", config)
    if weights is None:
        weights = jnp.ones(len(batch.labels), jnp.result_type(float))
    if not hasattr(weights, "shape"):
        raise TypeError(f"weights must be an array, got {weights!r}")
    if weights.shape != batch.labels.shape:
        raise ValueError(f"weights must have shape {list(batch.labels.shape)}, got {list(weights.shape)}")
    model = build_model(config, dropout_rate)
    images = augment(batch.images, key, config)

    def mean_loss(params):
        variables = {"params": params, **masks}
        log_probs = model.apply(variables, images, deterministic=False, rngs={"dropout": key})
        totals = _totals(log_probs, batch.labels, weights, _training_loss(config))
        metrics = jax.tree.map(lambda total: total / weights.sum(), totals)
        return metrics.loss, metrics

    grads, metrics = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = build_optimiser(config).update(grads, state.opt_state, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    return TrainState(params, opt_state, state.step + 1), metrics


def eval_step(params: Params, batch: Batch, *, config: TrainConfig) -> Metrics:
    """Measure loss and accuracy on one batch, dropout off, all examples at once.

    Args:
        params: The model's parameters.
        batch: n examples; `evaluate` takes a whole data set with bounded memory.
        config: Gives the widths; static.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit, there is no example, or a label names no class.

    >>> batch = Batch(jnp.zeros((4, 28, 28), jnp.uint8), jnp.arange(4))
    >>> metrics = eval_step(init_state(jax.random.key(0)).params, batch, config=TrainConfig())
    >>> metrics.loss.shape, metrics.accuracy.shape
    ((), ())
    """
    check_config(config)
    _check_data(batch, "batch", config)
    check_params(params, config)
    return _eval_step(params, batch, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _eval_step(params, batch, *, config):
    weights = jnp.ones(len(batch.labels), jnp.result_type(float))
    totals = _eval_totals(params, batch, weights, config)
    return jax.tree.map(lambda total: total / len(batch.labels), totals)


def evaluate(params: Params, batch: Batch, *, config: TrainConfig) -> Metrics:
    """Measure loss and accuracy on a data set of any size, dropout off, every example once.

    Args:
        params: The model's parameters.
        batch: n examples; they pass through the model in chunks of `config.eval_batch_size`.
        config: Gives the widths and the size of a chunk; static.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit, there is no example, or a label names no class.

    >>> batch = Batch(jnp.zeros((5, 28, 28), jnp.uint8), jnp.arange(5))
    >>> params = init_state(jax.random.key(0)).params
    >>> in_chunks = evaluate(params, batch, config=TrainConfig(eval_batch_size=2))
    >>> at_once = eval_step(params, batch, config=TrainConfig())
    >>> bool(jnp.allclose(in_chunks.loss, at_once.loss))
    True
    """
    check_config(config)
    _check_data(batch, "batch", config)
    check_params(params, config)
    return _evaluate(params, batch, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _evaluate(params, batch, *, config):
    n = len(batch.labels)
    size = min(config.eval_batch_size, n)
    chunks, weights = _pad_and_split(batch, n, size)
    totals = jax.lax.map(lambda chunk: _eval_totals(params, chunk[0], chunk[1], config), (chunks, weights))
    return jax.tree.map(lambda total: total.sum() / n, totals)


def train_epoch(
    state: TrainState,
    train: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig,
    dropout_rate: float | Float[Array, ""],
) -> tuple[TrainState, Float[Array, " steps"]]:
    """Take every training example once, in a new random order, as one compiled program.

    The last batch may be short: it is padded, and the padding has weight 0. `state.step` tells which epoch this is.

    Args:
        state: Where training stands, between two epochs.
        train: n training examples, on the device.
        key: The run's key, as `fit` takes it.
        config: Static.
        dropout_rate: Traced.

    Returns:
        The state ceil(n / batch_size) steps later, and the loss of each batch.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The rate is out of range, a shape is wrong, there is no example, the parameters do not fit the
            config, or `state` is not one between two epochs.

    >>> config = TrainConfig(batch_size=2)
    >>> train = Batch(jnp.zeros((5, 28, 28), jnp.uint8), jnp.arange(5))
    >>> key = jax.random.key(0)
    >>> state, losses = train_epoch(init_state(key, config=config), train, key, config=config, dropout_rate=0.0)
    >>> int(state.step), losses.shape
    (3, (3,))
    """
    dropout_rate = _check_step(key, config, dropout_rate)
    result = _train_epoch(state, train, key, dropout_rate, config=config)
    # To read the step may wait for the epoch before; this one is on its way by now, and nobody waits for it in vain.
    if not isinstance(state.step, Tracer):
        _check_between_epochs("state", state, config.steps_per_epoch(len(train.labels)))
    return result


@functools.partial(jax.jit, static_argnames="config")
def _train_epoch(state, train, key, dropout_rate, *, config):
    _check_state(state, config)
    _check_data(train, "train", config)
    n = len(train.labels)
    size = min(config.batch_size, n)
    steps = config.steps_per_epoch(n)
    keys = split_key(key)
    epoch = state.step // steps
    # jax.random.permutation sorts twice, to break ties that so few draws of 32 bits hardly have.
    # Both keys are drawn as one, which is fewer kernels to compile.
    order_key, epoch_key = jax.vmap(jax.random.fold_in, (0, None))(jnp.stack([keys.order, keys.dropout]), epoch)
    order = jnp.argsort(bits(order_key, (n,)))
    indices, weights = _pad_and_split(order, n, size)
    step_keys = jax.vmap(functools.partial(jax.random.fold_in, epoch_key))(jnp.arange(steps))

    def step(state, inputs):
        indices, weights, key, masks = inputs
        state, metrics = _train_step(state, _rows(train, indices), key, weights, dropout_rate, masks, config=config)
        return state, metrics.loss

    def stretch(state, inputs):
        draw = functools.partial(draw_masks, state.params, n=size, config=config, dropout_rate=dropout_rate)
        return jax.lax.scan(step, state, (*inputs, jax.vmap(draw)(inputs[-1])))

    length = _steps_in_a_stretch(steps, config)
    inputs = jax.tree.map(lambda leaf: leaf.reshape(-1, length, *leaf.shape[1:]), (indices, weights, step_keys))
    state, losses = jax.lax.scan(stretch, state, inputs)
    return state, losses.reshape(steps)


def _rows(batch: Batch, indices):
    return jax.tree.map(lambda leaf: leaf[indices], batch)


def _steps_in_a_stretch(steps: int, config: TrainConfig) -> int:
    """Tell for how many steps to draw masks together: a divisor of all, so that none is left over.

    On a CPU a step's own masks are so few that waking a second core for them costs more than it saves; beyond some
    megabytes the masks push the weights out of the cache. On a GPU a loop around the loop costs more than it saves.
    """
    if jax.default_backend() != "cpu":
        return 1
    units = sum(config.hidden) + (math.prod(config.image_shape) if config.input_dropout else 0)
    most = max(1, 2**21 // max(1, config.batch_size * units))
    return max(divisor for divisor in range(1, min(most, steps) + 1) if steps % divisor == 0)


def train_and_evaluate_epoch(
    lane: Lane,
    train: Batch,
    train_eval: Batch,
    validation: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig,
    dropout_rate: float | Float[Array, ""],
) -> tuple[Lane, Outcome]:
    """Take one epoch and both evaluations after it, as one compiled program.

    If a loss is not finite, the lane stays where it was.

    Args:
        lane: Where the run stands, between two epochs; `start_lane` makes the first.
        train: The training examples.
        train_eval: The examples that the fair training loss is measured on.
        validation: The validation examples.
        key: The run's key.
        config: Static.
        dropout_rate: Traced.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The rate is out of range, a shape is wrong, or there is no example.

    >>> config = TrainConfig(batch_size=2)
    >>> data = Batch(jnp.zeros((5, 28, 28), jnp.uint8), jnp.arange(5))
    >>> key = jax.random.key(0)
    >>> lane = start_lane(init_state(key, config=config))
    >>> lane, outcome = train_and_evaluate_epoch(lane, data, data, data, key, config=config, dropout_rate=0.0)
    >>> outcome.history.train.loss.item() == outcome.history.validation.loss.item() == lane.best.loss.item()
    True
    """
    dropout_rate = _check_step(key, config, dropout_rate)
    return _train_and_evaluate_epoch(lane, train, train_eval, validation, key, dropout_rate, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _train_and_evaluate_epoch(lane, train, train_eval, validation, key, dropout_rate, *, config):
    state, losses = train_epoch(lane.state, train, key, config=config, dropout_rate=dropout_rate)
    params = evaluated_params(state, config=config)
    on_train, on_validation = (evaluate(params, batch, config=config) for batch in (train_eval, validation))
    history = History(losses.mean(), on_train, on_validation)

    finite = jnp.isfinite(losses.mean() + on_train.loss + on_validation.loss)
    # A select for each leaf would take a tenth of the program's compilation.
    state = jax.lax.cond(finite, lambda: state, lambda: lane.state)
    history = jax.lax.cond(finite, lambda: history, lambda: jax.tree.map(lambda leaf: leaf * jnp.nan, history))
    better = finite & (on_validation.loss < lane.best.loss)
    best = jax.lax.cond(better, lambda: Best(params, on_validation.loss), lambda: lane.best)
    # What is appended is found where every loss is finite.
    good_steps = jnp.append(jnp.isfinite(losses), False).argmin()
    return Lane(state, best), Outcome(history, good_steps)


def evaluated_params(state: TrainState, *, config: TrainConfig) -> Params:
    """Give the parameters that are evaluated: the moving average if the config asks for one, else the state's own.

    Args:
        state: Where training stands.
        config: `average_decay`.

    Raises:
        ValueError: The config asks for an average that the state does not hold.

    >>> config = TrainConfig(average_decay=0.99)
    >>> state = init_state(jax.random.key(0), config=config)
    >>> evaluated_params(state, config=config)["fc1"]["kernel"].shape
    (784, 256)
    """
    if config.average_decay is None:
        return state.params
    for part in cast(tuple, state.opt_state):
        if isinstance(part, AverageState):
            return part.average
    raise ValueError(
        "state holds no averaged parameters, which config.average_decay asks for; it was made with another config"
    )


def start_lane(state: TrainState) -> Lane:
    """Begin a run: nothing has been measured yet.

    Args:
        state: Where to start.

    >>> start_lane(init_state(jax.random.key(0))).best.loss.item()
    inf
    """
    return Lane(state, Best(state.params, jnp.array(jnp.inf, jnp.result_type(float))))


def fit(
    train: Batch,
    validation: Batch,
    *,
    key: Key[Array, ""],
    config: TrainConfig = TrainConfig(),
    dropout_rate: float = 0.0,
    epochs: int = 30,
    start: TrainState | None = None,
    on_epoch: OnEpoch | None = None,
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
) -> Run:
    """Train one network and measure it after every epoch.

    The same arguments give the same bytes on the same device. Neither the epoch nor the rate is part of the compiled
    program, so a second call with other ones compiles nothing.

    Args:
        train: Training examples, n images and labels; copied to the device.
        validation: Validation examples, likewise.
        key: The run's only source of randomness, from `jax.random.key(seed)`.
        config: What is fixed at compile time.
        dropout_rate: Share of hidden units to drop, in [0, 1).
        epochs: Passes over the training set, at least 1.
        start: Where to start; `init_state(key, config=config)` by default.
        on_epoch: Called after each epoch that is trained, with an `EpochEnd`, before the epoch is saved: what a run
            that was killed reported and had not saved is reported again, and so is an epoch in whose report an error
            ended the run. `KeyboardInterrupt` stands for Ctrl-C.
        checkpoint: A directory to save to and to go on from, or `Checkpoints` with more to say. A run that was killed
            goes on from there, and ends with the same bytes as one that was not.

    Returns:
        The final state, a History of NumPy arrays [epochs], and the best parameters. Ctrl-C ends the run after the
        epoch that is under way: the History is then shorter than was asked for. A second one ends it at once. SIGTERM
        does the same if there is a checkpoint directory, and then ends the process. A loop over runs learns of a Ctrl-C
        in a last epoch by `signals.noting_signals`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument is out of range or has the wrong shape, `config.model` gives no log-probabilities, or
            `checkpoint` belongs to another run.
        NonFiniteLossError: A loss was infinite or not a number.
        OSError: The checkpoint directory cannot be written, or another run uses it.

    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> run = fit(data, data, key=jax.random.key(0), dropout_rate=0.2, epochs=2)
    >>> run.history.validation.loss.shape, int(run.state.step)
    ((2,), 4)
    """
    check_key(key)
    dropout_rate = check_rate(dropout_rate)
    epochs = check_count("epochs", epochs, 1)
    check_run(train, validation, config=config, on_epoch=on_epoch)
    train_eval = train_eval_part(train, config)
    steps = config.steps_per_epoch(len(train.labels))
    if start is not None:
        _check_start(start, config, steps)
    identity = {
        "program": "fit",
        "dropout_rate": dropout_rate,
        "key": [str(jax.random.key_impl(key)), *np.asarray(jax.random.key_data(key)).tolist()],
        "start": None if start is None else content_digest(start),
    }
    data = train, train_eval, validation
    on_device: tuple[Batch, Batch, Batch] = jax.tree.map(jnp.array, data)

    def epoch(lane):
        return train_and_evaluate_epoch(lane, *on_device, key, config=config, dropout_rate=dropout_rate)

    lane = start_lane(init_state(key, config=config) if start is None else _place(start))
    check_log_probabilities(lane.state.params, config)
    with open_store(checkpoint, identity, config=config, train=train, validation=validation) as store:
        return run_epochs(
            epoch,
            lane,
            epochs=epochs,
            steps=steps,
            names=np.array(f"dropout {dropout_rate:g}"),
            on_epoch=on_epoch,
            epoch_end=functools.partial(
                EpochEnd,
                config=config,
                train_size=len(train.labels),
                dropout_rates=(dropout_rate,),
                seeds=None,
            ),
            store=store,
        )


def open_store(
    checkpoint: Checkpoints | str | os.PathLike[str] | None,
    identity: dict[str, Any],
    *,
    config: TrainConfig,
    train: Batch,
    validation: Batch,
    **circumstances: Any,
) -> contextlib.AbstractContextManager[Store | None]:
    """Open the directory that a run saves to, if there is one.

    Args:
        checkpoint: As `fit` takes it.
        identity: What sets this run apart, beside the config and the data.
        config: The run's config.
        train: The training examples.
        validation: The validation examples.
        **circumstances: How the run is laid out, beside its devices.

    >>> data = Batch(np.zeros((5, 28, 28), np.uint8), np.arange(5))
    >>> with open_store(None, {}, config=TrainConfig(), train=data, validation=data) as store:
    ...     store is None
    True
    """
    if checkpoint is None:
        return contextlib.nullcontext()
    identity = identity | {
        "config": config.as_dict(),
        "data": {"train": content_digest(train), "validation": content_digest(validation)},
        # Without it, the same key draws other numbers.
        "jax_threefry_partitionable": getattr(jax.config, "jax_threefry_partitionable", True),
    }
    device = jax.devices()[0]
    layout = {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax_default_matmul_precision": jax.default_matmul_precision.value,
    }
    return Store(checkpoint, identity=identity, circumstances=layout | circumstances)


def _place(tree):
    return jax.tree.map(jnp.asarray, tree)


def check_run(train: Batch, validation: Batch, *, config: TrainConfig, on_epoch: OnEpoch | None) -> None:
    """Refuse arguments that `fit` and `sweep` share and cannot use, before anything is compiled.

    Args:
        train: As `fit` takes it, and so on.
        validation: Likewise.
        config: Likewise.
        on_epoch: Likewise.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape.

    >>> data = Batch(np.zeros((1, 14, 14), np.uint8), np.zeros(1, np.int32))
    >>> check_run(data, data, config=TrainConfig(), on_epoch=None)
    Traceback (most recent call last):
    ValueError: train.images must have shape [n, 28, 28] for this config, got [1, 14, 14]
    """
    check_config(config)
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"on_epoch must be callable, got {on_epoch!r}")
    _check_data(train, "train", config)
    _check_data(validation, "validation", config)


def run_epochs(
    epoch: Callable[[Lane], tuple[Lane, Outcome]],
    lane: Lane,
    *,
    epochs: int,
    steps: int,
    names: np.ndarray,
    on_epoch: OnEpoch | None,
    epoch_end: Callable[..., EpochEnd],
    store: Store | None,
    to_host: Callable[[Any], Any] = jax.device_get,
    to_devices: Callable[[Any], Any] = _place,
) -> Run:
    """Run epochs in turn; report and save each, and collect what they measured.

    Args:
        epoch: Takes the lane (or all lanes) to the next epoch, on the devices.
        lane: Where to start, on the devices.
        epochs: How many.
        steps: Steps of an epoch.
        names: Name of each lane, in the axes that `to_host` gives: [] or [rates, seeds].
        on_epoch: Receives the reports.
        epoch_end: Makes a report of `epoch`, `epochs`, `history` and `fetch_state`.
        store: Where to save and to go on from.
        to_host: Brings a pytree to the host, as NumPy arrays.
        to_devices: Brings one back.

    Returns:
        The state after the last complete epoch, on the devices, and its History with a last axis [epochs].

    Raises:
        NonFiniteLossError: No lane is left with finite losses.
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """
    rows: list[History] = []

    def run() -> Run:
        return Run(lane.state, jax.tree.map(lambda *leaves: np.stack(leaves, axis=-1), *rows), lane.best)

    def save() -> None:
        if store is not None and rows and store.saved != len(rows):
            loss = rows[-1].validation.loss
            store.save(len(rows), run()._replace(**to_host(lane)._asdict()), loss=float(loss[np.isfinite(loss)].mean()))

    @contextlib.contextmanager
    def saved_on_error() -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            # Of several processes this one alone may have failed, and to fetch the lanes takes all.
            if jax.process_count() == 1:
                save()
            raise

    if store is not None:
        # On the devices, lanes that only fill them up may follow the others, along one axis.
        saved = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*names.shape, *leaf.shape[min(names.ndim, 1) :]), leaf.dtype), lane
        )
        # As long as the run that was saved.
        leaf: Any = 0
        found = store.restore(Run(saved.state, History(leaf, Metrics(leaf, leaf), Metrics(leaf, leaf)), saved.best))
        if found is not None:
            if found.step > epochs:
                raise ValueError(
                    f"epochs is {epochs}, and {store.directory} holds epoch {found.step} of this run; ask for as many, "
                    "or name another directory"
                )
            logger.info("going on after epoch %d of %d, from %s", found.step, epochs, store.directory)
            lane = to_devices(Lane(found.tree.state, found.tree.best))
            rows = [jax.tree.map(lambda leaf, i=i: leaf[..., i], found.tree.history) for i in range(found.step)]

    with noting_signals(terminate=store is not None) as noted, contextlib.ExitStack() as at_the_end:
        if store is not None:
            # A SIGTERM that was noted ends the process where this block ends, by an error too.
            at_the_end.callback(store.wait)
        while len(rows) < epochs and not (noted and rows):
            with saved_on_error():
                after, outcome = epoch(lane)
                _wait(outcome)
                history, good_steps = to_host(outcome)
            stopped = np.isnan(history.running_loss)
            before = np.isnan(rows[-1].running_loss) if rows else np.zeros_like(stopped)
            if (stopped & ~before).any():
                save()
                _report_non_finite(stopped, before, good_steps, names, len(rows) + 1, steps, run() if rows else None)
            if on_epoch is not None:
                fetch_state = functools.partial(to_host, after.state)
                end = epoch_end(epoch=len(rows) + 1, epochs=epochs, history=history, fetch_state=fetch_state)
                try:
                    with saved_on_error():
                        on_epoch(end)
                except KeyboardInterrupt:
                    if len(noted) > 1:
                        raise
                    noted.append(signal.SIGINT)
            # After the report: a run that ends in between reports the epoch again, and leaves none out.
            lane, rows = after, [*rows, history]
            if store is not None and len(rows) % store.every == 0:
                save()
        save()
        if store is not None:
            store.wait()
            if noted[:1] == [signal.SIGTERM]:
                logger.warning(
                    "stopped by SIGTERM after epoch %d of %d, saved in %s; the same call goes on from there",
                    len(rows),
                    epochs,
                    store.directory,
                )
    return run()


def _report_non_finite(stopped, before, good_steps, names, epoch, steps, run) -> None:
    """Warn of each lane that has just stopped; raise if none is left."""
    at = [int(good) + 1 if good < steps else None for good in good_steps[stopped & ~before]]
    lanes = [
        f"{name}: the loss is not finite in {f'step {step} of' if step else 'the evaluation after'} epoch {epoch}"
        for name, step in zip(names[stopped & ~before], at, strict=True)
    ]
    good = f"after {epoch - 1} good epochs"
    if stopped.all():
        told = "; ".join(lanes) if len(lanes) <= FEW_LANES else f"all {len(lanes)} lanes that were left; {lanes[0]}"
        raise NonFiniteLossError(f"{told}, {good}; a lower learning_rate may help", epoch=epoch, step=at[0], run=run)
    for lane in lanes:
        warnings.warn(f"{lane}, {good}; this lane stays there, and its History is NaN from then on", stacklevel=2)


def train_eval_part(train: Batch, config: TrainConfig) -> Batch:
    """Choose the training examples that the fair training loss is measured on: the same ones for every run.

    Args:
        train: The training examples.
        config: `config.train_eval_size` tells how many.

    >>> train = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> len(train_eval_part(train, TrainConfig(train_eval_size=30)).labels)
    30
    """
    check_batch(train, "train", classes=config.classes)
    size = config.train_eval_size
    if size is None or size >= len(train.labels):
        return train
    return subset(train, size, key=jax.random.key(0))


def _wait(tree) -> None:
    """Wait for a program in Python, where a second Ctrl-C is heard."""
    for leaf in jax.tree.leaves(tree):
        while not leaf.is_ready():
            time.sleep(0.0005)


def _training_loss(config):
    if config.loss is not None:
        return config.loss
    if not config.label_smoothing:
        return negative_log_likelihood

    def smoothed(log_probs, labels):
        spread = -log_probs.mean(axis=1)
        return (1 - config.label_smoothing) * negative_log_likelihood(
            log_probs, labels
        ) + config.label_smoothing * spread

    return smoothed


def _totals(log_probs, labels, weights, loss_of=negative_log_likelihood) -> Metrics:
    loss = loss_of(log_probs, labels)
    if jnp.shape(loss) != labels.shape:
        raise ValueError(f"config.loss must give one number an example, [{len(labels)}], got {list(jnp.shape(loss))}")
    correct = log_probs.argmax(axis=1) == labels
    return Metrics((weights * loss).sum(), (weights * correct).sum())


def _eval_totals(params, batch, weights, config) -> Metrics:
    log_probs = build_model(config).apply({"params": params}, batch.images, deterministic=True)
    return _totals(log_probs, batch.labels, weights)


def _pad_and_split(tree, n: int, size: int):
    """Split the leading axis n into [ceil(n / size), size]; the padding gets weight 0, the rest weight 1.

    The padding repeats the last example: of black images a network of one's own may make NaN, and NaN times 0 is NaN.
    """
    steps = -(-n // size)

    def split(leaf, mode="edge"):
        padding = [(0, steps * size - n)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, padding, mode).reshape(steps, size, *leaf.shape[1:])

    return jax.tree.map(split, tree), split(jnp.ones(n, jnp.result_type(float)), "constant")


def _check_data(batch: Batch, name: str, config: TrainConfig) -> None:
    check_batch(batch, name, classes=config.classes)
    if batch.images.shape[1:] != config.image_shape:
        expected = ", ".join(map(str, ("n", *config.image_shape)))
        raise ValueError(f"{name}.images must have shape [{expected}] for this config, got {list(batch.images.shape)}")


def _check_state(state, config: TrainConfig) -> None:
    _check_is_state("state", state)
    check_params(state.params, config)
    _check_leaf_names("state", state, config)


def _check_is_state(name: str, state) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(f"{name} must be a TrainState, as init_state gives it, got {type(state).__name__}")


def _check_leaf_names(name: str, state: TrainState, config: TrainConfig) -> None:
    names, expected = _leaf_names(state), _expected_names(config)
    if names != expected:
        wrong = [f"{name}{leaf} is missing" for leaf in sorted(expected - names)]
        wrong += [f"{name}{leaf} is one too many" for leaf in sorted(names - expected)]
        raise ValueError(f"{name} does not fit the config: {'; '.join(wrong)}")


@functools.lru_cache(maxsize=128)
def _expected_names(config: TrainConfig) -> frozenset[str]:
    return _leaf_names(_expected_state(config))


def _expected_state(config: TrainConfig) -> TrainState:
    return jax.eval_shape(functools.partial(init_state, config=config), jax.random.key(0))


def _leaf_names(tree) -> frozenset[str]:
    return frozenset(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))


def _check_between_epochs(name: str, state: TrainState, steps: int) -> None:
    if int(state.step) % steps:
        raise ValueError(f"{name}.step must be a multiple of the {steps} steps of an epoch, got {int(state.step)}")


def _check_start(start: TrainState, config: TrainConfig, steps: int) -> None:
    _check_is_state("start", start)
    _check_leaf_names("start", start, config)
    expected = _expected_state(config)
    pairs = zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(expected), strict=True)
    for (path, found), leaf in pairs:
        if (jnp.shape(found), jnp.result_type(found)) != (leaf.shape, leaf.dtype):
            name = "start" + jax.tree_util.keystr(path)
            raise ValueError(
                f"{name} must be {leaf.dtype}{list(leaf.shape)} for this config, "
                f"got {jnp.result_type(found)}{list(jnp.shape(found))}"
            )
    if jax.tree.structure(start) != jax.tree.structure(expected):
        raise ValueError(
            "start does not fit the config: its containers must be those of init_state, such as plain dicts"
        )
    _check_between_epochs("start", start, steps)


def _check_step(key, config, dropout_rate):
    """Refuse what no step can use; give the rate as one type, so that a program serves all that are not traced."""
    check_key(key)
    check_config(config)
    return check_rate(dropout_rate)
