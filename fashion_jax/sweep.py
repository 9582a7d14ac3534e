"""Many runs as one program: every pair of a seed and a dropout rate is a lane.

Lanes are sharded over all devices, of all processes if there are several. On a CPU each device trains its lanes one
after the other, which keeps a network in its core's cache; on an accelerator it trains many at once.

Within a seed all rates share the initial weights, the batch order and the uniform draws behind the dropout masks, so
that differences between rates are paired.
"""

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fashion_jax.config import TrainConfig
from fashion_jax.data import Batch, subset
from fashion_jax.model import check_rate
from fashion_jax.train import (
    OnEpoch,
    Run,
    check_run,
    init_state,
    run_epochs,
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
        RuntimeError: JAX has started its devices already.
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
        ValueError: Only some of the three are given.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError(
            "coordinator, processes and process belong together; "
            f"got coordinator={coordinator!r}, processes={processes!r}, process={process!r}"
        )
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
        on_epoch: Called after each epoch with an `EpochEnd`.
        devices: The `jax.Device`s to train on; all devices of all processes by default.
        lanes_at_once: Lanes that one device trains at the same time; by default 1 on a CPU and as many as
            fit on others.

    Returns:
        State and History whose leaves have leading axes [rates, seeds], or [sizes, rates, seeds]; the History's are
        NumPy arrays with a last axis [epochs]. Ctrl-C ends the run after the last complete epoch, or the last complete
        size: the History is then shorter than was asked for.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument is out of range, has the wrong shape, or names something twice.

    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> run = sweep(data, data, seeds=[0, 1, 2], dropout_rates=[0.0, 0.2], epochs=4)
    >>> run.history.validation.loss.shape, run.state.params["fc4"]["bias"].shape
    ((2, 3, 4), (2, 3, 10))
    """
    seeds, dropout_rates = _listed(seeds, "seeds"), _listed(dropout_rates, "dropout_rates")
    for seed in seeds:
        if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
            raise TypeError(f"seeds must be ints, got {seed!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds must lie between 0 and 2**32 - 1, got {seed}")
    for rate in dropout_rates:
        check_rate(rate, "dropout_rates")
    dropout_rates = [float(rate) for rate in dropout_rates]
    if train_sizes is not None:
        train_sizes = _listed(train_sizes, "train_sizes")
    # The program takes the rates as float32: those that are alike there would be one lane twice.
    rounded = [float(np.float32(rate)) for rate in dropout_rates]
    for name, values in (("seeds", seeds), ("dropout_rates", rounded), ("train_sizes", train_sizes)):
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{name} must name at least one, and none twice; got {values}")
    check_run(train, validation, config=config, epochs=epochs, on_epoch=on_epoch)
    if lanes_at_once is not None and (not isinstance(lanes_at_once, int) or isinstance(lanes_at_once, bool)):
        raise TypeError(f"lanes_at_once must be an int, got {lanes_at_once!r}")
    if devices is not None and not len(devices):
        raise ValueError("devices must name at least one; leave it out for all")
    if train_sizes is None:
        return _sweep(train, validation, seeds, dropout_rates, config, epochs, on_epoch, devices, lanes_at_once)

    parts = [subset(train, size, key=jax.random.key(0)) for size in train_sizes]
    runs: list[Run] = []
    for part in parts:
        run = _sweep(part, validation, seeds, dropout_rates, config, epochs, on_epoch, devices, lanes_at_once)
        if run.history.running_loss.shape[-1] < epochs:
            break
        runs.append(run)
    if not runs:
        raise KeyboardInterrupt
    return jax.tree.map(lambda *leaves: np.stack(leaves), *runs)


def lanes_that_fit(device: Any, config: TrainConfig) -> int:
    """Estimate how many lanes a device can train at the same time: 1 on a CPU.

    Args:
        device: A `jax.Device`.
        config: Gives the widths and the batch sizes.

    >>> lanes_that_fit(jax.devices("cpu")[0], TrainConfig())
    1
    """
    if device.platform == "cpu":
        return 1
    widths = (784, *config.hidden, 10)
    params = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    # Parameters, two moments and a gradient, and old and new of each; hidden units forward and backward.
    floats = 8 * params + 4 * sum(widths) * config.batch_size + 2 * sum(widths[1:]) * config.eval_batch_size
    limit = (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)
    return max(1, int(MEMORY_SHARE * limit / (4 * floats)))


def _sweep(train, validation, seeds, dropout_rates, config, epochs, on_epoch, devices, lanes_at_once) -> Run:
    mesh = Mesh(np.array(devices or jax.devices()), ("lanes",), axis_types=(AxisType.Auto,))
    if lanes_at_once is None:
        lanes_at_once = lanes_that_fit(mesh.devices.flat[0], config)
    if lanes_at_once < 1:
        raise ValueError(f"lanes_at_once must be at least 1, got {lanes_at_once}")

    # Rates vary slowest, as in the result; lanes that only fill up the last device repeat the first.
    keys = np.stack([np.asarray(jax.random.key_data(jax.random.key(seed))) for seed in seeds])
    keys = np.tile(keys, (len(dropout_rates), 1))
    rates = np.repeat(np.array(dropout_rates, np.float32), len(seeds))
    lanes = len(rates)
    filled = np.resize(np.arange(lanes), -(-lanes // mesh.size) * mesh.size)
    keys, rates = (_place(leaf[filled], mesh, P("lanes")) for leaf in (keys, rates))
    # A CPU device may use a NumPy array as it lies in memory, and the caller may change its own.
    data = jax.tree.map(
        lambda leaf: _place(np.array(leaf), mesh, P()), (train, train_eval_part(train, config), validation)
    )

    def to_host(tree):
        if jax.process_count() > 1:
            tree = multihost_utils.process_allgather(tree, tiled=True)
        return _unfold(jax.device_get(tree), rates=len(dropout_rates), seeds=len(seeds))

    def report(end):
        # Bringing every state to the host costs time, and reshaping it where it is would take a collective.
        on_epoch(end._replace(fetch_state=lambda: to_host(end.fetch_state())))

    def epoch(state):
        state, history = _epoch(state, *data, keys, rates, config=config, mesh=mesh, lanes_at_once=lanes_at_once)
        return state, to_host(history)

    start = _start(keys, config=config, mesh=mesh)
    run = run_epochs(
        epoch, start, epochs=epochs, dropout_rates=tuple(dropout_rates), on_epoch=report if on_epoch else None
    )
    return Run(to_host(run.state), run.history)


def _listed(values, name: str) -> list:
    if isinstance(values, str) or not hasattr(values, "__iter__") or np.ndim(values) == 0:
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}")
    return list(values)


def _unfold(tree, *, rates: int, seeds: int):
    """Turn the axis of lanes into [rates, seeds], without the lanes that only filled up a device."""
    return jax.tree.map(lambda leaf: leaf[: rates * seeds].reshape(rates, seeds, *leaf.shape[1:]), tree)


def _place(array: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """Put an array that every process holds whole onto the devices of all."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _start(keys, *, config, mesh):
    def local(keys):
        return jax.lax.map(lambda key: init_state(jax.random.wrap_key_data(key), config=config), keys)

    return jax.shard_map(local, mesh=mesh, in_specs=P("lanes"), out_specs=P("lanes"), check_vma=False)(keys)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "lanes_at_once"))
def _epoch(state, train, train_eval, validation, keys, rates, *, config, mesh, lanes_at_once):
    def local(state, train, train_eval, validation, keys, rates):
        def lane(inputs):
            state, key, rate = inputs
            key = jax.random.wrap_key_data(key)
            return train_and_evaluate_epoch(state, train, train_eval, validation, key, config=config, dropout_rate=rate)

        at_once = None if lanes_at_once == 1 else min(lanes_at_once, len(rates))
        return jax.lax.map(lane, (state, keys, rates), batch_size=at_once)

    lanes, everywhere = P("lanes"), P()
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(lanes, everywhere, everywhere, everywhere, lanes, lanes),
        out_specs=lanes,
        check_vma=False,
    )
    return mapped(state, train, train_eval, validation, keys, rates)
