"""Runs: `fit` trains one network, `sweep` many in one program. One engine serves both: a run is a lane.

A lane is a key and its hyperparameters. A compiled program takes every lane one epoch further: shuffle, steps, and both
evaluations. A Python loop over epochs reports, saves and stops.
"""

import functools
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from fashion_jax import _checks, _model_checks
from fashion_jax.callbacks import Callback, EpochEnd, shown
from fashion_jax.checkpoint import Checkpoints, NoStore, Store, describe, identify
from fashion_jax.config import TrainConfig
from fashion_jax.data import subset
from fashion_jax.devices import Lanes, remembered_interrupts
from fashion_jax.hyperparameters import checked, complete
from fashion_jax.steps import eval_step, evaluate, init_state, train_epoch, train_step
from fashion_jax.types import Batch, Best, History, Measured, Metrics, Run, Sweep, TrainState

__all__ = ["eval_step", "evaluate", "fit", "init_state", "sweep", "train_epoch", "train_step"]
logger: logging.Logger = logging.getLogger(__name__)


class Carry(NamedTuple):
    """A run's state and best parameters, which each epoch passes to the next."""

    state: TrainState
    best: Best


class Data(NamedTuple):
    """The data of all lanes: training examples, those on which the training loss is evaluated, validation examples."""

    train: Batch
    train_eval: Batch
    validation: Batch


def fit(
    train: Batch,
    validation: Batch,
    *,
    key: Key[Array, ""],
    config: TrainConfig = TrainConfig(),
    epochs: int = 30,
    start: TrainState | Best | None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool | None = None,
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
    **hyperparameters: float | int,
) -> Run:
    """Train one network and evaluate it after every epoch.

    The same arguments give the same bytes on the same device. Changing the hyperparameters or the number of epochs does
    not recompile.

    Args:
        train: Training examples.
        validation: Validation examples.
        key: The run's only source of randomness, from `jax.random.key(seed)`.
        config: Model, optimizer, loss and batches: everything that is fixed at compile time.
        epochs: Passes over the training set.
        start: A state to continue from, or the `best` of a run, whose parameters then start a new one.
        callbacks: Called after each epoch with an `EpochEnd`; the run ends when one returns a true bool. A run that
            resumes calls them for the last saved epoch again.
        progress: Whether to show each epoch, as `Progress` does; by default on a terminal and in a notebook.
        checkpoint: Directory to save every epoch to. A run that was killed resumes there, and ends with the same bytes.
        **hyperparameters: Fields of the model, such as `dropout_rate`, and arguments of the optimizer factory.

    Returns:
        The last state, the history as NumPy arrays [epochs], and the best parameters. Ctrl-C returns the run so far.

    Raises:
        TypeError, ValueError: An argument does not fit, or `checkpoint` belongs to another run.
        FloatingPointError: The run diverged: a loss is infinite or not a number.
        OSError: The checkpoint cannot be written, or another run is saving there.

    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> run = fit(data, data, key=jax.random.key(0), dropout_rate=0.2, epochs=2)
    >>> run.history.validation.loss.shape, int(run.state.step)
    ((2,), 4)
    """
    lanes = [(_checks.key(key), checked(config, hyperparameters))]
    runs = _placed(lanes, train, validation, config, jax.local_devices()[:1], 1)
    return _train(runs, {}, epochs, shown(callbacks, progress), checkpoint, start)


def sweep(
    train: Batch,
    validation: Batch,
    *,
    seeds: Iterable[int],
    config: TrainConfig = TrainConfig(),
    epochs: int = 30,
    callbacks: Iterable[Callback] = (),
    progress: bool | None = None,
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
    devices: Sequence[Any] | None = None,
    lanes_at_once: int | None = None,
    **hyperparameters: float | int | Sequence[float | int],
) -> Sweep:
    """Train a network for every combination of hyperparameters and seeds, as one program.

    Each run makes the same random draws as `fit` with `jax.random.key(seed)`: within a seed all share initial
    parameters, batch order and the uniform numbers behind the dropout masks. With several processes, call it in each
    with the same arguments.

    Args:
        train: Training examples.
        validation: Validation examples.
        seeds: Seed of each run.
        config, epochs, callbacks, progress, checkpoint: As for `fit`; several processes must share the directory.
        devices: Devices to train on, all by default.
        lanes_at_once: Runs that a device trains together: by default 1 on a CPU, as many as fit on accelerators.
        **hyperparameters: As for `fit`; a sequence of numbers is an axis of the result.

    Returns:
        A `Sweep` of NumPy arrays, whose axes are the sequences in the order given, and the seeds. A run that diverges
        stays at its last good epoch, with a warning, and its history is NaN from then on.

    Raises:
        TypeError, ValueError, OSError: As for `fit`; FloatingPointError only if every run diverged.

    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> result = sweep(data, data, seeds=range(3), dropout_rate=(0.0, 0.2), epochs=4)
    >>> result.history.validation.loss.shape, result.at(dropout_rate=0.2, seed=1).best.params["fc4"]["bias"].shape
    ((2, 3, 4), (10,))
    """
    numbers = checked(config, hyperparameters, axes=True)
    varied = {name: values for name, values in numbers.items() if isinstance(values, tuple)}
    fixed = {name: value for name, value in numbers.items() if name not in varied}
    seeds = _checks.axis("seeds", seeds, _checks.seed)
    lanes = [
        (jax.random.key(seed), fixed | dict(zip(varied, values, strict=True)))
        for *values, seed in itertools.product(*varied.values(), seeds)
    ]
    axes = varied | {"seed": seeds}
    if lanes_at_once is not None:
        lanes_at_once = _checks.integer("lanes_at_once", lanes_at_once, 1)
    runs = _placed(lanes, train, validation, config, jax.devices() if devices is None else devices, lanes_at_once)
    return Sweep(axes, *_train(runs, axes, epochs, shown(callbacks, progress), checkpoint))


def _placed(lanes, train, validation, config, devices, lanes_at_once) -> Lanes:
    """Check that the arguments fit together, and place lanes and data on the devices."""
    train, validation = _checks.batch("train", train), _checks.batch("validation", validation)
    lanes = [(key, complete(config, numbers)) for key, numbers in lanes]
    _model_checks.experiment(config, train, validation, lanes)

    size = config.train_eval_size or len(train.labels)
    train_eval = subset(train, size, key=jax.random.key(0)) if size < len(train.labels) else train
    return Lanes(lanes, Data(train, train_eval, validation), config, devices, lanes_at_once)


def _train(runs: Lanes, axes, epochs, callbacks, checkpoint, start=None) -> Run:
    """Initialize the runs, or resume them, and train; leaves [*axes, ...]."""
    epochs = _checks.integer("epochs", epochs, 1)
    state = runs.map(_start)
    # Infinity comes from the host: what a program computes would end a run under jax_debug_infs.
    worst = np.full(len(runs.lanes), np.inf, jnp.result_type(float))
    loss, never = runs.place((worst, np.zeros(len(runs.lanes), np.int32)))
    carry = Carry(state, Best(state.params, loss, never, state.collections))
    _model_checks.initial(runs.config, state, runs.data.train.images[:1], runs.fetch)
    if start is not None:
        carry = runs.place(_model_checks.start(start, runs.fetch(carry)))
    store: Any = NoStore()
    if checkpoint is not None:
        program = runs.digest(_epoch, carry, (np.int32(0), np.True_))
        identity = identify(runs.lanes, axes, runs.data, start, program=program)
        store = Store(checkpoint, identity=identity, hints=describe(runs.config), writes=runs.writes)
    with store:
        run = _run_epochs(runs, axes, carry, store, epochs, callbacks)
    return _reshape(run, axes)


def _run_epochs(runs: Lanes, axes, carry: Carry, store: Any, epochs: int, callbacks) -> Run:
    """Train epoch after epoch; report and save each. Leaves [lanes, ...]."""

    def so_far() -> Run:
        carry, history = progress
        state, best = runs.fetch(carry)
        return Run(state, history, best)

    def save(*, last: bool = False) -> None:
        losses = np.ma.masked_invalid(progress[1].validation.loss).mean(axis=0).filled(np.inf)
        store.save(len(losses), so_far, best=1 + int(np.argmin(losses)), last=last)

    def report(epoch: int) -> bool:
        """Call the callbacks; return whether one of them ends the run."""
        carry, history = progress
        end = EpochEnd(
            epoch, epochs, axes, fixed, _reshape(history, axes), lambda: _reshape(runs.fetch(carry.state), axes)
        )
        answers = [callback(end) for callback in callbacks]
        return any(isinstance(answer, (bool, np.bool_)) and answer for answer in answers)

    fixed = {name: value for name, value in runs.lanes[0][1].items() if name not in axes}
    saved, run = store.restore(Run(carry.state, _no_epochs(runs), carry.best))
    # One name for both, so that a Ctrl-C at any moment finds them from the same epoch.
    progress = (runs.place(Carry(run.state, run.best)) if saved else carry, run.history)
    if saved > epochs:
        raise ValueError(f"epochs is {epochs}, and the checkpoint is of epoch {saved}; ask for as many or more")
    if saved:
        logger.info("resuming after epoch %d of %d", saved, epochs)
    try:
        with remembered_interrupts() as pressed:
            # The callback that ended a run ends it again.
            epoch, ended = saved, 0 < saved < epochs and report(saved)
            while epoch < epochs and not ended:
                if pressed:
                    raise KeyboardInterrupt
                epoch += 1
                evaluated = np.bool_(epoch % runs.config.evaluate_every == 0 or epoch == epochs)
                carry, measured = runs.map(_epoch, progress[0], (np.int32(epoch), evaluated))
                row = runs.fetch(measured)
                if not evaluated:
                    on_train, on_validation = jax.tree.map(lambda leaf: leaf * np.nan, (row.train, row.validation))
                    row = row._replace(train=on_train, validation=on_validation)
                history = jax.tree.map(lambda curve, new: np.c_[curve, new], progress[1], row)
                _checks.epoch(history, axes)
                progress = (carry, history)
                ended = report(epoch)
                save()
    except KeyboardInterrupt:
        done = progress[1].running_loss.shape[1]
        if not done:
            raise
        logger.warning("interrupted after epoch %d of %d; %s", done, epochs, store.advice)
    save(last=True)
    return so_far()


def _no_epochs(runs: Lanes) -> History:
    """Return the history before the first epoch, leaves [lanes, 0]."""
    none = np.empty((len(runs.lanes), 0), jnp.result_type(float))
    of_evaluations = dict.fromkeys(runs.config.metrics_of("log_probs", "labels"), none)
    metrics = Measured(none, none, of_evaluations) if of_evaluations else Metrics(none, none)
    return History(none, metrics, metrics, dict.fromkeys(runs.config.metrics_of("grads", "updates"), none))


def _start(key, numbers, carry: None, turn: None, data: Data, *, config: TrainConfig) -> TrainState:
    """Initialize one run."""
    return init_state(key, config=config, image_shape=data.train.images.shape[1:], **numbers)


def _epoch(key, numbers, carry: Carry, turn, data: Data, *, config: TrainConfig) -> tuple[Carry, History]:
    """Train one run for one epoch and evaluate it if due; one whose losses are not finite stays where it was."""
    epoch, evaluated = turn
    state, steps = train_epoch(carry.state, data.train, key, config=config, **numbers)
    params = state.params if config.eval_params is None else config.eval_params(state.opt_state, state.params)
    candidate = Best(params, carry.best.loss, epoch, state.collections)

    def measure():
        of_candidate = functools.partial(evaluate, candidate, config=config, **numbers)
        return of_candidate(data.train_eval), of_candidate(data.validation)

    if config.evaluate_every == 1:
        on_train, on_validation = measure()
    else:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(measure))
        on_train, on_validation = jax.lax.cond(evaluated, measure, lambda: nothing)
    measured = jax.tree.map(jnp.mean, steps)
    loss, others = (measured.loss, measured.others) if isinstance(measured, Measured) else (measured, {})
    finite = jnp.isfinite(loss + on_train.loss + on_validation.loss)
    better = finite & evaluated & (on_validation.loss < carry.best.loss)
    # Conditions on whole trees: a select for each leaf takes longer to compile.
    state = jax.lax.cond(finite, lambda: state, lambda: carry.state)
    best = jax.lax.cond(better, lambda: candidate._replace(loss=on_validation.loss), lambda: carry.best)
    history = History(loss, on_train, on_validation, others)
    return Carry(state, best), jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.nan), history)


def _reshape(tree: Any, axes: Mapping[str, Sequence[Any]]) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape((*map(len, axes.values()), *leaf.shape[1:])), tree)
