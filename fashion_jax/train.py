"""Training: one step, one epoch, one run.

Everything is a pure function of its arguments. A run is determined by its key, its data, its `TrainConfig` and its
dropout rate; the key is split once into three streams (initial weights, batch order, dropout), and the epoch and step
numbers are folded in, so that a run can go on from nothing but its seed and its state.
"""

import contextlib
import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from fashion_jax.config import TrainConfig
from fashion_jax.data import Batch, check_batch, check_key, subset
from fashion_jax.model import FashionMLP, check_rate

Params = dict[str, Any]


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
        opt_state: Adam's moments.
        step: Steps taken.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class Run(NamedTuple):
    """A trained state and how it came about."""

    state: TrainState
    history: History


class EpochEnd(NamedTuple):
    """What `fit` and `sweep` hand to `on_epoch`.

    Attributes:
        epoch: Number of the epoch that has ended, from 1.
        epochs: Number of epochs that were asked for.
        dropout_rates: The rates that are trained; `fit` has one.
        history: What was measured; leaves are NumPy arrays, without axes from `fit`, [rates, seeds] from `sweep`.
        fetch_state: Brings the state after the epoch, with the same axes in front. From `sweep` it is on the host; of
            several processes all have to call it.
    """

    epoch: int
    epochs: int
    dropout_rates: tuple[float, ...]
    history: History
    fetch_state: Callable[[], TrainState]


OnEpoch = Callable[[EpochEnd], object]


class BestParams:
    """Keep each run's parameters from the epoch with its lowest validation loss: what early stopping returns.

    Give it to `fit` or `sweep` as `on_epoch`.

    Attributes:
        params: The kept parameters, with the axes of the runs in front; NumPy arrays.

    >>> best = BestParams()
    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> run = fit(data, data, key=jax.random.key(0), epochs=3, on_epoch=best)
    >>> loss = evaluate(best.params, data, config=TrainConfig()).loss
    >>> bool(np.isclose(loss, run.history.validation.loss.min()))
    True
    """

    def __init__(self):
        self.params: Params = {}
        self._loss: np.ndarray | None = None

    def __call__(self, end: EpochEnd) -> None:
        """Keep the parameters of the runs that are better than ever."""
        loss = np.asarray(end.history.validation.loss)
        params = jax.device_get(end.fetch_state().params)
        if self._loss is None or loss.shape != self._loss.shape or end.epoch == 1:
            self._loss, self.params = np.array(loss), params
            return
        better = loss < self._loss

        def choose(new, old):
            return np.where(better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old)

        self.params = jax.tree.map(choose, params, self.params)
        self._loss = np.where(better, loss, self._loss)


class RunKeys(NamedTuple):
    """The three streams of random numbers of a run."""

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
    _check_config(config)
    return _init_state(key, config)


@functools.partial(jax.jit, static_argnames="config")
def _init_state(key, config):
    images = jnp.zeros((1, 28, 28), jnp.uint8)
    variables = FashionMLP(config.hidden).init(split_key(key).init, images, deterministic=True)
    params = cast(Params, variables["params"])
    return TrainState(params, _optimiser(config).init(params), jnp.zeros((), jnp.int32))


def negative_log_likelihood(
    log_probs: Float[Array, "n classes"], labels: Int[Array | np.ndarray, " n"]
) -> Float[Array, " n"]:
    """Take each example's negative log-probability of its label, in nats; NaN where the label names no class.

    >>> loss = negative_log_likelihood(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]))
    >>> f"{loss[0]:.4f}"
    '1.3863'
    """
    # A negative index would count from the last class; one beyond it is filled with NaN.
    labels = jnp.asarray(labels)
    labels = jnp.where(labels < 0, log_probs.shape[1], labels)
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1, mode="fill", fill_value=jnp.nan)[:, 0]


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig,
    dropout_rate: float | Float[Array, ""],
    weights: Float[Array, " n"] | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one Adam step on the mean negative log likelihood of a batch, dropout on.

    Args:
        state: Where training stands.
        batch: n examples.
        key: This step's key, for the dropout masks.
        config: Gives the widths and the learning rate; static.
        dropout_rate: Share of hidden units to drop; traced, so another rate compiles nothing.
        weights: Weight of each example in the mean; 0 for padding. All 1 if left out.

    Returns:
        The next state, and the batch's loss and accuracy under the old weights and the drawn masks. A label that names
        no class makes the loss NaN: to look at the labels on the host would cost time at every step.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The rate is out of range, or a shape is wrong.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, as `optax.adam` has it.

    >>> config = TrainConfig()
    >>> batch = Batch(jnp.zeros((4, 28, 28), jnp.uint8), jnp.arange(4))
    >>> state = init_state(jax.random.key(0), config=config)
    >>> state, metrics = train_step(state, batch, jax.random.key(1), config=config, dropout_rate=0.2)
    >>> int(state.step), metrics.loss.shape
    (1, ())
    """
    _check_step(key, config, dropout_rate)
    return _train_step(state, batch, key, weights, dropout_rate, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _train_step(state, batch, key, weights, dropout_rate, *, config):
    _check_data(batch, "batch")
    if weights is None:
        weights = jnp.ones(len(batch.labels), jnp.result_type(float))
    if weights.shape != batch.labels.shape:
        raise ValueError(f"weights must have shape {list(batch.labels.shape)}, got {list(weights.shape)}")
    model = FashionMLP(config.hidden, dropout_rate)

    def mean_loss(params):
        log_probs = model.apply({"params": params}, batch.images, deterministic=False, rngs={"dropout": key})
        totals = _totals(log_probs, batch.labels, weights)
        metrics = jax.tree.map(lambda total: total / weights.sum(), totals)
        return metrics.loss, metrics

    grads, metrics = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = _optimiser(config).update(grads, state.opt_state)
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
    _check_config(config)
    _check_data(batch, "batch")
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
    _check_config(config)
    _check_data(batch, "batch")
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
) -> tuple[TrainState, Float[Array, ""]]:
    """Take every training example once, in a new random order, as one compiled program.

    The last batch may be short: it is padded, and the padding has weight 0. `state.step` tells which epoch this is.

    Args:
        state: Where training stands, between two epochs.
        train: n training examples, on the device.
        key: The run's key, as `fit` takes it.
        config: Static.
        dropout_rate: Traced.

    Returns:
        The state ceil(n / batch_size) steps later, and the mean of the batch losses.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The rate is out of range, a shape is wrong, or there is no example.

    >>> config = TrainConfig(batch_size=2)
    >>> train = Batch(jnp.zeros((5, 28, 28), jnp.uint8), jnp.arange(5))
    >>> key = jax.random.key(0)
    >>> state, loss = train_epoch(init_state(key, config=config), train, key, config=config, dropout_rate=0.0)
    >>> int(state.step)
    3
    """
    _check_step(key, config, dropout_rate)
    return _train_epoch(state, train, key, dropout_rate, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _train_epoch(state, train, key, dropout_rate, *, config):
    _check_data(train, "train")
    n = len(train.labels)
    steps = -(-n // config.batch_size)
    keys = split_key(key)
    epoch = state.step // steps
    # jax.random.permutation sorts twice, to break ties that so few draws of 32 bits hardly have.
    order = jnp.argsort(jax.random.bits(jax.random.fold_in(keys.order, epoch), (n,)))
    indices, weights = _pad_and_split(order, n, config.batch_size)
    epoch_key = jax.random.fold_in(keys.dropout, epoch)
    step_keys = jax.vmap(functools.partial(jax.random.fold_in, epoch_key))(jnp.arange(steps))

    def step(state, inputs):
        indices, weights, key = inputs
        batch = jax.tree.map(lambda leaf: leaf[indices], train)
        state, metrics = train_step(state, batch, key, config=config, dropout_rate=dropout_rate, weights=weights)
        return state, metrics.loss

    state, losses = jax.lax.scan(step, state, (indices, weights, step_keys))
    return state, losses.mean()


def train_and_evaluate_epoch(
    state: TrainState,
    train: Batch,
    train_eval: Batch,
    validation: Batch,
    key: Key[Array, ""],
    *,
    config: TrainConfig,
    dropout_rate: float | Float[Array, ""],
) -> tuple[TrainState, History]:
    """Take one epoch and both evaluations after it, as one compiled program.

    Args:
        state: Where training stands, between two epochs.
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
    >>> state = init_state(key, config=config)
    >>> state, history = train_and_evaluate_epoch(state, data, data, data, key, config=config, dropout_rate=0.0)
    >>> history.train.loss.item() == history.validation.loss.item()
    True
    """
    _check_step(key, config, dropout_rate)
    return _train_and_evaluate_epoch(state, train, train_eval, validation, key, dropout_rate, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _train_and_evaluate_epoch(state, train, train_eval, validation, key, dropout_rate, *, config):
    state, running_loss = train_epoch(state, train, key, config=config, dropout_rate=dropout_rate)
    metrics = [evaluate(state.params, batch, config=config) for batch in (train_eval, validation)]
    return state, History(running_loss, *metrics)


def fit(
    train: Batch,
    validation: Batch,
    *,
    key: Key[Array, ""],
    config: TrainConfig = TrainConfig(),
    dropout_rate: float = 0.0,
    epochs: int = 30,
    on_epoch: OnEpoch | None = None,
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
        on_epoch: Called after each epoch with an `EpochEnd`.

    Returns:
        The final state, and a History of NumPy arrays [epochs]. Ctrl-C ends the run after the last complete epoch: the
        History is then shorter than was asked for.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument is out of range or has the wrong shape.

    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> run = fit(data, data, key=jax.random.key(0), dropout_rate=0.2, epochs=2)
    >>> run.history.validation.loss.shape, int(run.state.step)
    ((2,), 4)
    """
    check_key(key)
    check_rate(dropout_rate)
    check_run(train, validation, config=config, epochs=epochs, on_epoch=on_epoch)
    train_eval = train_eval_part(train, config)
    train, train_eval, validation = jax.tree.map(jnp.array, (train, train_eval, validation))

    def epoch(state):
        state, history = train_and_evaluate_epoch(
            state, train, train_eval, validation, key, config=config, dropout_rate=dropout_rate
        )
        return state, jax.device_get(history)

    start = init_state(key, config=config)
    return run_epochs(epoch, start, epochs=epochs, dropout_rates=(float(dropout_rate),), on_epoch=on_epoch)


def check_run(train: Batch, validation: Batch, *, config: TrainConfig, epochs: int, on_epoch: OnEpoch | None) -> None:
    """Refuse arguments that `fit` and `sweep` share and cannot use, before anything is compiled.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument is out of range or has the wrong shape.

    >>> data = Batch(np.zeros((1, 14, 14), np.uint8), np.zeros(1, np.int32))
    >>> check_run(data, data, config=TrainConfig(), epochs=1, on_epoch=None)
    Traceback (most recent call last):
    ValueError: train.images must have shape [n, 28, 28], got [1, 14, 14]
    """
    _check_config(config)
    _check_epochs(epochs)
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"on_epoch must be callable, got {on_epoch!r}")
    _check_data(train, "train")
    _check_data(validation, "validation")


def run_epochs(
    epoch: Callable[[TrainState], tuple[TrainState, History]],
    state: TrainState,
    *,
    epochs: int,
    dropout_rates: tuple[float, ...],
    on_epoch: OnEpoch | None,
) -> Run:
    """Run epochs in turn, report each, and collect what they measured.

    Args:
        epoch: Takes the state to the next one, and measures it; the measures are on the host.
        state: Where to start.
        epochs: How many, at least 1.
        dropout_rates: For the reports.
        on_epoch: Receives the reports.

    Returns:
        The state after the last complete epoch, and its History with a last axis [epochs]. Ctrl-C ends the run after
        the epoch that is under way; a second Ctrl-C ends it at once.

    Raises:
        TypeError: `epochs` is not an int.
        ValueError: `epochs` is below 1.
        KeyboardInterrupt: Not even one epoch was complete.
    """
    _check_epochs(epochs)
    rows: list[History] = []
    try:
        with _noting_ctrl_c() as pressed:
            while len(rows) < epochs and not (pressed and rows):
                after, measured = epoch(state)
                state, rows = after, [*rows, measured]
                if on_epoch is not None:
                    on_epoch(EpochEnd(len(rows), epochs, dropout_rates, measured, functools.partial(_same, state)))
    except KeyboardInterrupt:
        if not rows:
            raise
    return Run(state, jax.tree.map(lambda *leaves: np.stack(leaves, axis=-1), *rows))


def train_eval_part(train: Batch, config: TrainConfig) -> Batch:
    """Choose the training examples that the fair training loss is measured on: the same ones for every run.

    Args:
        train: The training examples.
        config: `config.train_eval_size` tells how many.

    >>> train = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> len(train_eval_part(train, TrainConfig(train_eval_size=30)).labels)
    30
    """
    check_batch(train, "train")
    size = config.train_eval_size
    if size is None or size >= len(train.labels):
        return train
    return subset(train, size, key=jax.random.key(0))


@contextlib.contextmanager
def _noting_ctrl_c() -> Iterator[list[int]]:
    """Let the first Ctrl-C only take note, in the list that this yields; a second one interrupts.

    So the epoch that is under way is not lost. The main thread alone may change handlers, and a handler that somebody
    else has set is left as it is.
    """
    pressed: list[int] = []

    def note(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    default = signal.default_int_handler
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is default
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, default)


def _same(state: TrainState) -> TrainState:
    return state


def _optimiser(config: TrainConfig) -> optax.GradientTransformation:
    b1, b2 = 0.9, 0.999

    def learning_rate(count):
        # optax computes Adam's bias corrections 1 - b**t in float32, where 1 - 0.999 is off by 1.3e-5. That shrinks all
        # early updates alike, and two networks that differ so are soon different networks. The rate undoes it.
        t = count + 1
        rounded1, rounded2 = 1 - b1**t, 1 - b2**t
        exact1, exact2 = (-jnp.expm1(t * math.log(b)) for b in (b1, b2))
        return config.learning_rate * (rounded1 / exact1) * jnp.sqrt(exact2 / rounded2)

    return optax.adam(learning_rate, b1=b1, b2=b2)


def _totals(log_probs, labels, weights) -> Metrics:
    loss = negative_log_likelihood(log_probs, labels)
    correct = log_probs.argmax(axis=1) == labels
    return Metrics((weights * loss).sum(), (weights * correct).sum())


def _eval_totals(params, batch, weights, config) -> Metrics:
    log_probs = FashionMLP(config.hidden).apply({"params": params}, batch.images, deterministic=True)
    return _totals(log_probs, batch.labels, weights)


def _pad_and_split(tree, n: int, size: int):
    """Split the leading axis n into [ceil(n / size), size]; the padding gets weight 0, the rest weight 1."""
    steps = -(-n // size)

    def split(leaf):
        padding = [(0, steps * size - n)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, padding).reshape(steps, size, *leaf.shape[1:])

    return jax.tree.map(split, tree), split(jnp.ones(n, jnp.result_type(float)))


def _check_data(batch: Batch, name: str) -> None:
    check_batch(batch, name)
    if batch.images.shape[1:] != (28, 28):
        raise ValueError(f"{name}.images must have shape [n, 28, 28], got {list(batch.images.shape)}")


def _check_config(config) -> None:
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {config!r}")


def _check_epochs(epochs) -> None:
    if not isinstance(epochs, int) or isinstance(epochs, bool):
        raise TypeError(f"epochs must be an int, got {epochs!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")


def _check_step(key, config, dropout_rate) -> None:
    check_key(key)
    check_rate(dropout_rate)
    _check_config(config)
