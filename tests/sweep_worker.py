"""A process that trains, and helpers shared by the tests of runs.

Usage: sweep_worker.py OPTIONS, the arguments of `main` as JSON.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from fashion_jax import Batch, FashionMLP, TrainConfig, devices
from fashion_jax.train import fit, sweep
from fashion_jax.types import History, Metrics

ROOT = Path(__file__).parents[1]
CONFIG = TrainConfig(model=FashionMLP(hidden=(16,)), optimizer=optax.adamw, train_eval_size=150)
# Compiles faster.
LINEAR = TrainConfig(model=FashionMLP(hidden=()), optimizer=optax.adamw)


def leaves(result) -> list[np.ndarray]:
    """The arrays of a `Run` or a `Sweep`."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves((result.state, result.history, result.best))]


def same(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def equal(first, second) -> None:
    for a, b in zip(leaves(first), leaves(second), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def close(first, second, **tolerance) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), first, second)


def history(*shape) -> History:
    leaves = np.random.default_rng(0).uniform(0.2, 0.5, (5, *shape))
    return History(leaves[0], Metrics(leaves[1], leaves[2]), Metrics(leaves[3], leaves[4]))


def run(*options: dict) -> list[subprocess.CompletedProcess]:
    """Start a process for each, and wait for all. Sets are ordered differently in each."""
    with contextlib.ExitStack() as stack:
        started = []
        for number, own in enumerate(options, start=1):
            environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(number)}
            command = [sys.executable, __file__, json.dumps(own, default=str)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)))
            stack.callback(started[-1].kill)
        outputs = [process.communicate(timeout=300) for process in started]
    pairs = zip(started, outputs, strict=True)
    return [subprocess.CompletedProcess(process.args, process.returncode, *output) for process, output in pairs]


def main(*, data, arguments, output=None, cpus=1, use=(), machines=(), longer=0, die_in="", die_at=0) -> None:
    """Train on the arrays in a file, and die at a call of a callback ("epoch") or of a function of `os`.

    `use` is a slice of the devices, `machines` are the arguments of `join_machines`. When the result is written, a
    `longer` run follows.
    """
    jax.config.update("jax_num_cpu_devices", cpus)
    if machines:
        devices.HEARTBEAT_SECONDS = 10
        devices.join_machines(*machines)
    with np.load(data) as file:
        arrays = [file[name] for name in file.files]
    calls, real = itertools.count(1), getattr(os, die_in, lambda end: None)

    def die(*given, **named):
        if next(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    if hasattr(os, die_in):
        setattr(os, die_in, die)
    options = {"config": LINEAR, "callbacks": [die] if die_in == "epoch" else [], **arguments}
    if use:
        options["devices"] = jax.devices()[slice(*use)]
    if "key" in arguments:
        options["key"] = jax.random.key(options["key"])
    train = functools.partial(sweep if "seeds" in arguments else fit, Batch(*arrays[:2]), Batch(*arrays[2:]), **options)
    result = train()
    if output:
        np.savez(output, *leaves(result))
    print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)
    if longer:
        train(epochs=longer)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(**json.loads(sys.argv[1]))
