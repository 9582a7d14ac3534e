"""Many runs as one program: every pair of a seed and a dropout rate is a lane.

Lanes are sharded over all devices, of all processes if there are several. On a CPU each device trains its lanes one
after the other, which keeps a network in its core's cache; on an accelerator it trains many at once.

Within a seed all rates share the initial weights, the batch order and the uniform draws behind the dropout masks, so
that differences between rates are paired.
"""

import functools
import math
import numbers
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fashion_jax.checkpoint import Checkpoints
from fashion_jax.config import TrainConfig, check_count
from fashion_jax.data import Batch, subset
from fashion_jax.model import check_log_probabilities, check_rate, sizes
from fashion_jax.signals import noting_signals
from fashion_jax.threefry import is_threefry
from fashion_jax.train import (
    EpochEnd,
    History,
    Lane,
    Metrics,
    NonFiniteLossError,
    OnEpoch,
    Run,
    check_run,
    init_state,
    open_store,
    run_epochs,
    start_lane,
    train_and_evaluate_epoch,
    train_eval_part,
)

# Share of an accelerator's memory that lanes may take; the rest is for the data, and for what XLA needs besides.
MEMORY_SHARE = 0.5
# Seconds after which a silent process counts as dead.
HEARTBEAT_SECONDS = 30


def use_all_cores() -> None:
    """Give JAX one CPU device for each core that this process may use; call it before the first JAX operation.

    It does nothing on a machine with an accelerator.

    Raises:
        RuntimeError: JAX has started its devices already, and there are not as many.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    jax.config.update("jax_num_cpu_devices", cores)


def join_machines(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Make this process one of several that train together; call it before the first JAX operation.

    A thin wrapper around `jax.distributed.initialize`, whose short time-outs make a process that lost another one end
    with an error rather than wait.

    Args:
        coordinator: host:port of process 0. Without it JAX asks the launcher (SLURM, Open MPI, Cloud TPU).
        processes: How many there are.
        process: Number of this one, from 0.

    Raises:
        ValueError: Only some of the three are given, or the coordinator has no port.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError(
            "coordinator, processes and process belong together; "
            f"got coordinator={coordinator!r}, processes={processes!r}, process={process!r}"
        )
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"coordinator must be host:port, got {coordinator!r}")
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def sweep(
    train: Batch,
    validation: Batch,
    *,
    seeds: Sequence[int],
    dropout_rates: Sequence[float],
    train_sizes: Sequence[int] | None = None,
    config: TrainConfig = TrainConfig(),
    epochs: int = 30,
    on_epoch: OnEpoch | None = None,
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
    devices: Sequence[Any] | None = None,
    lanes_at_once: int | None = None,
) -> Run:
    """Train a network for every pair of a dropout rate and a seed, as one program.

    Lane (i, j) makes exactly the random draws of `fit(key=jax.random.key(seeds[j]), dropout_rate=dropout_rates[i])`.
    Its figures may differ from that run's by rounding: bit-equality holds on the same device and layout only.

    After `jax.distributed.initialize`, call it with the same arguments in every process: the lanes are spread over the
    devices of all, and each process receives the whole History and state.

    Args:
        train: Training examples; copied to each device.
        validation: Validation examples, likewise.
        seeds: Seed of each run, no two alike.
        dropout_rates: Shares of hidden units to drop, no two alike.
        train_sizes: Numbers of training examples to use; nested subsets, the same for all rates and seeds. Each size is
            a program of its own, trained after the one before.
        config: What is fixed at compile time.
        epochs: Passes over the training set, at least 1.
        on_epoch: Called after each epoch that is trained, with an `EpochEnd`, as `fit` does.
        checkpoint: A directory to save to and to go on from, as `fit` takes it; with `train_sizes` each size has a
            directory of its own inside. On another number of devices the sweep goes on within rounding, not bit by bit.
            Several processes must share the directory.
        devices: What to train on, of `jax.devices()`; all devices of all processes by default.
        lanes_at_once: Lanes that one device trains at the same time; by default 1 on a CPU and as many as
            fit on others.

    Returns:
        NumPy arrays whose leaves have leading axes [rates, seeds], or [sizes, rates, seeds]; the History's have a last
        axis [epochs]. A lane whose loss is not finite stays where it was, with a warning, and its History is NaN from
        then on; so are all of a size of which none is left, where another size has some. Ctrl-C ends the run after the
        last complete epoch, or the last complete size: the History is then shorter than was asked for.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument is out of range, has the wrong shape, or names something twice, `config.model` gives no
            log-probabilities, or `checkpoint` belongs to another sweep.
        NonFiniteLossError: No lane is left with finite losses, of any size.
        MemoryError: A device has no room for so many lanes.
        OSError: The checkpoint directory cannot be written, or another run uses it.

    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> run = sweep(data, data, seeds=[0, 1, 2], dropout_rates=[0.0, 0.2], epochs=4)
    >>> run.history.validation.loss.shape, run.state.params["fc4"]["bias"].shape
    ((2, 3, 4), (2, 3, 10))
    """
    seeds, dropout_rates = check_seeds(seeds), _listed(dropout_rates, "dropout_rates")
    dropout_rates = [check_rate(rate, "dropout_rates") for rate in dropout_rates]
    _check_distinct(rates_as_trained(dropout_rates), "dropout_rates")
    epochs = check_count("epochs", epochs, 1)
    check_run(train, validation, config=config, on_epoch=on_epoch)
    if train_sizes is not None:
        train_sizes = [check_count("train_sizes", size, 1) for size in _listed(train_sizes, "train_sizes")]
        _check_distinct(train_sizes, "train_sizes")
        n = len(train.labels)
        if max(train_sizes) > n:
            raise ValueError(f"train_sizes must lie between 1 and the {n} examples that there are, got {train_sizes}")
    if lanes_at_once is not None:
        lanes_at_once = check_count("lanes_at_once", lanes_at_once, 1)
    if devices is not None:
        devices = _listed(devices, "devices", "devices")
        if not all(isinstance(device, jax.Device) for device in devices):
            raise TypeError(f"devices must be some of jax.devices(), got {devices}")
        _check_distinct(devices, "devices")
    one_size = functools.partial(
        _sweep,
        validation=validation,
        seeds=seeds,
        dropout_rates=dropout_rates,
        config=config,
        epochs=epochs,
        on_epoch=on_epoch,
        devices=devices,
        lanes_at_once=lanes_at_once,
    )
    if train_sizes is None:
        return one_size(train, checkpoint=checkpoint)

    parts = [subset(train, size, key=jax.random.key(0)) for size in train_sizes]
    runs: list[Run] = []
    errors: list[NonFiniteLossError] = []
    within = None if checkpoint is None else Checkpoints.of(checkpoint).within
    with noting_signals(terminate=checkpoint is not None) as noted:
        for part in parts:
            try:
                run = one_size(part, checkpoint=within and within(f"{len(part.labels)}-images"))
            except NonFiniteLossError as error:
                errors.append(error)
                if len(parts) > 1:
                    warnings.warn(f"of {len(part.labels)} training examples: {error}", stacklevel=2)
                run = stopped_run(error.run, config=config, dropout_rates=dropout_rates, seeds=seeds, epochs=epochs)
            if run.history.running_loss.shape[-1] < epochs:
                break
            runs.append(run)
            if noted:
                break
    if not runs:
        raise KeyboardInterrupt
    if len(errors) == len(runs):
        raise errors[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *runs)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Refuse what cannot be the seeds of a sweep; give them as Python's own numbers.

    Args:
        seeds: What a caller gave.

    Raises:
        TypeError: It is no sequence of ints.
        ValueError: One is out of range or named twice, or there is none.

    >>> check_seeds(range(3))
    [0, 1, 2]
    """
    listed = _listed(seeds, "seeds")
    for seed in listed:
        if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
            raise TypeError(f"seeds must be ints, got {seed!r}")
        if not 0 <= int(seed) < 2**32:
            raise ValueError(f"seeds must lie between 0 and 2**32 - 1, got {seed}")
    listed = list(map(int, listed))
    _check_distinct(listed, "seeds")
    return listed


def rates_as_trained(dropout_rates: Sequence[float]) -> list[float]:
    """Round dropout rates to the type in which programs take them: rates that are alike there would be one lane twice.

    Args:
        dropout_rates: As they were given.

    >>> rates_as_trained([0.1 + 0.2]) == rates_as_trained([0.3])
    True
    """
    return np.array(dropout_rates, jnp.result_type(float)).tolist()


def stopped_run(
    before: Run | None, *, config: TrainConfig, dropout_rates: Sequence[float], seeds: Sequence[int], epochs: int
) -> Run:
    """Give the Run of a sweep all of whose lanes have stopped, as `sweep` gives it where one is left.

    Args:
        before: The Run until the epoch before, from the error; None if there was none.
        config: As it was trained, and so on.
        dropout_rates: Likewise.
        seeds: Likewise.
        epochs: How many were asked for.

    Returns:
        NumPy arrays with leading axes [rates, seeds]; the History is NaN where nothing was measured.

    >>> run = stopped_run(None, config=TrainConfig(), dropout_rates=[0.0, 0.2], seeds=[0], epochs=3)
    >>> run.history.running_loss.shape, int(run.state.step.max())
    ((2, 1, 3), 0)
    """
    if before is None:
        starts = [start_lane(init_state(jax.random.key(seed), config=config)) for seed in seeds]
        lane = jax.tree.map(lambda *leaves: np.stack([np.stack(leaves)] * len(dropout_rates)), *starts)
        none = np.zeros((len(dropout_rates), len(seeds), 0), lane.best.loss.dtype)
        before = Run(lane.state, History(none, Metrics(none, none), Metrics(none, none)), lane.best)
    lacking = [(0, 0), (0, 0), (0, epochs - before.history.running_loss.shape[-1])]
    history = jax.tree.map(lambda leaf: np.pad(leaf, lacking, constant_values=np.nan), before.history)
    return before._replace(history=history)


def lanes_that_fit(device: Any, config: TrainConfig) -> int:
    """Estimate how many lanes a device can train at the same time: 1 on a CPU.

    Args:
        device: A `jax.Device`.
        config: Gives the widths and the batch sizes.

    >>> lanes_that_fit(jax.devices("cpu")[0], TrainConfig())
    1
    """
    return 1 if device.platform == "cpu" else max(1, int(MEMORY_SHARE * _memory(device) / _lane_bytes(config)))


def _memory(device: Any) -> int:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit or 8 * 2**30


def _lane_bytes(config: TrainConfig) -> int:
    """Estimate what a lane takes while it trains."""
    params, outputs = sizes(config)
    pixels = math.prod(config.image_shape)
    # Parameters, two moments and the best parameters, old and new of each, and a gradient; what modules give, forward
    # and backward.
    copies = 9 if config.average_decay is None else 11
    return 4 * (copies * params + 2 * (pixels + outputs) * config.batch_size + outputs * config.eval_batch_size)


def _too_many(lanes: int, mesh: Mesh, lanes_at_once: int, config: TrainConfig) -> MemoryError:
    # The CPU's devices share its memory.
    share = mesh.size if mesh.devices.flat[0].platform == "cpu" else 1
    room = int(_memory(mesh.local_devices[0]) / _lane_bytes(config) / share) * mesh.size
    return MemoryError(
        f"{lanes} lanes on {mesh.size} devices, {lanes_at_once} at once on each, do not fit into their memory; about "
        f"{room} lanes of this config do. Use fewer seeds or dropout_rates, or a lower lanes_at_once"
    )


def _sweep(
    train, *, validation, seeds, dropout_rates, config, epochs, on_epoch, checkpoint, devices, lanes_at_once
) -> Run:
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), ("lanes",), axis_types=(AxisType.Auto,))
    together = is_threefry(jax.random.key(0))
    generator = jax.random.key_impl(jax.random.key(0))
    if lanes_at_once is None:
        lanes_at_once = lanes_that_fit(mesh.local_devices[0], config) if together else 1
    if lanes_at_once != 1 and not together:
        raise ValueError(
            f"lanes_at_once must be 1 where jax_default_prng_impl is {generator}, whose draws "
            f"for several lanes at once are not those of each alone; got {lanes_at_once}"
        )

    lanes = len(seeds) * len(dropout_rates)
    on_each = -(-lanes // mesh.size) * (mesh.size if mesh.devices.flat[0].platform == "cpu" else 1)
    if on_each * _lane_bytes(config) > _memory(mesh.local_devices[0]):
        raise _too_many(lanes, mesh, lanes_at_once, config)

    # Rates vary slowest, as in the result; lanes that only fill up the last device repeat the first.
    axes = len(dropout_rates), len(seeds)
    keys = np.stack([np.asarray(jax.random.key_data(jax.random.key(seed))) for seed in seeds])
    keys = np.tile(keys, (len(dropout_rates), 1))
    rates = np.repeat(np.array(rates_as_trained(dropout_rates), jnp.result_type(float)), len(seeds))
    filled = np.resize(np.arange(lanes), -(-lanes // mesh.size) * mesh.size)
    keys, rates = (_place(leaf[filled], mesh, P("lanes")) for leaf in (keys, rates))
    # A CPU device may use a NumPy array as it lies in memory, and the caller may change its own.
    data = jax.tree.map(
        lambda leaf: _place(np.array(leaf), mesh, P()), (train, train_eval_part(train, config), validation)
    )

    def to_host(tree):
        # Reshaping where the lanes are would take a collective.
        if jax.process_count() > 1:
            tree = multihost_utils.process_allgather(tree, tiled=True)
        return jax.tree.map(lambda leaf: leaf[:lanes].reshape(axes + leaf.shape[1:]), jax.device_get(tree))

    def to_devices(tree):
        return jax.tree.map(
            lambda leaf: _place(leaf.reshape(-1, *leaf.shape[2:])[filled], mesh, P("lanes")),
            tree,
        )

    def epoch(lane):
        return _epoch(
            lane, *data, keys, rates, config=config, mesh=mesh, generator=generator, lanes_at_once=lanes_at_once
        )

    identity = {
        "program": "sweep",
        "seeds": seeds,
        "generator": str(generator),
        "dropout_rates": dropout_rates,
    }
    layout = {"devices": mesh.size, "lanes_at_once": lanes_at_once}
    try:
        start = _start(keys, config=config, mesh=mesh, generator=generator)
        if config.model is not None:
            first = jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], start.state.params)
            check_log_probabilities(first, config)
        with open_store(checkpoint, identity, config=config, train=train, validation=validation, **layout) as store:
            run = run_epochs(
                epoch,
                start,
                epochs=epochs,
                steps=config.steps_per_epoch(len(train.labels)),
                names=np.array([[f"dropout {rate:g}, seed {seed}" for seed in seeds] for rate in dropout_rates]),
                on_epoch=on_epoch,
                epoch_end=functools.partial(
                    EpochEnd,
                    config=config,
                    train_size=len(train.labels),
                    dropout_rates=tuple(dropout_rates),
                    seeds=tuple(seeds),
                ),
                store=store,
                to_host=to_host,
                to_devices=to_devices,
            )
            return run._replace(**to_host(Lane(run.state, run.best))._asdict())
    except NonFiniteLossError as error:
        if error.run is not None:
            error.run = error.run._replace(**to_host(Lane(error.run.state, error.run.best))._asdict())
        raise
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_many(lanes, mesh, lanes_at_once, config) from error


def _listed(values, name: str, of: str = "numbers") -> list:
    if isinstance(values, str) or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a sequence of {of}, got {values!r}")
    return list(values)


def _check_distinct(values: list, name: str) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must name at least one, and none twice; got {values}")


def _place(array: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """Put an array that every process holds whole onto the devices of all."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


@functools.partial(jax.jit, static_argnames=("config", "mesh", "generator"))
def _start(keys, *, config, mesh, generator):
    def local(keys):
        return jax.lax.map(
            lambda key: start_lane(init_state(jax.random.wrap_key_data(key, impl=generator), config=config)), keys
        )

    return jax.shard_map(local, mesh=mesh, in_specs=P("lanes"), out_specs=P("lanes"), check_vma=False)(keys)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "generator", "lanes_at_once"))
def _epoch(lanes, train, train_eval, validation, keys, rates, *, config, mesh, generator, lanes_at_once):
    def local(lanes, train, train_eval, validation, keys, rates):
        def one(inputs):
            lane, key, rate = inputs
            key = jax.random.wrap_key_data(key, impl=generator)
            return train_and_evaluate_epoch(lane, train, train_eval, validation, key, config=config, dropout_rate=rate)

        at_once = None if lanes_at_once == 1 else min(lanes_at_once, len(rates))
        return jax.lax.map(one, (lanes, keys, rates), batch_size=at_once)

    split, everywhere = P("lanes"), P()
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, everywhere, everywhere, everywhere, split, split),
        out_specs=split,
        check_vma=False,
    )
    return mapped(lanes, train, train_eval, validation, keys, rates)
