"""What does a model cost when many train as one program? Sweeps of several sizes against `fit` and against PyTorch."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import torch

from benchmarks import harness
from benchmarks.reference import FastLoop, GraphLoop
from benchmarks.throughput import Torch
from fashion_jax import fit, sweep, use_all_cores

RATES = (0.0, 0.2)  # Of both sides, half of the models each.


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    device: Literal["cpu", "gpu"] = "cpu"  # Where both sides run.
    lanes: tuple[int, ...] = (2, 16)  # Lanes of each sweep, even numbers: half without dropout, half with 0.2.


class OnEachCore:
    """PyTorch's fastest loop on each core, in a process of its own with one thread: many models the quickest way."""

    def __init__(self):
        self.connections = []
        # Forked, a process would share the threads that JAX and PyTorch believe to have.
        context = multiprocessing.get_context("spawn")
        for core in harness.cores():
            ours, theirs = context.Pipe()
            context.Process(target=_train_on, args=(core, theirs), daemon=True).start()
            theirs.close()
            self.connections.append(ours)

    def epoch(self) -> list[float]:
        """Train an epoch with both evaluations in each process; return the losses."""
        for connection in self.connections:
            connection.send(None)
        return [connection.recv() for connection in self.connections]


def _train_on(core, connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    data = harness.load_data()
    program = Torch(FastLoop(data.train, dropout_rate=RATES[core % 2], seed=core), data)
    # Raised when the process that asks has ended.
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()
            connection.send(program.turn().loss)


def main(flags: Flags) -> None:
    if any(lanes % 2 for lanes in flags.lanes):
        raise ValueError(f"--lanes must be even: half of them train without dropout; got {flags.lanes}")
    device = harness.use_device(flags.device)
    if flags.device == "cpu":
        use_all_cores()
    data = harness.load_data()
    train, _, test = data

    def by_torch(kind: type[FastLoop]) -> Callable[[], float]:
        both = [Torch(kind(train, dropout_rate=rate, device=device), data) for rate in RATES]
        return lambda: sum(program.turn().both for program in both) / len(both)

    programs = {"PyTorch, in memory, fused Adam": by_torch(FastLoop)}
    if flags.device == "gpu":
        programs["PyTorch, the same, as a CUDA graph"] = by_torch(GraphLoop)
    else:
        epoch, cores = OnEachCore().epoch, len(harness.cores())
        programs["PyTorch, the same, a process on each core"] = lambda: harness.timed(epoch)[1] / cores
    programs["fit"] = partial(harness.second_epoch, partial(fit, train, test, key=jax.random.key(0), dropout_rate=0.2))
    others = list(programs)
    for lanes in flags.lanes:
        together = partial(sweep, train, test, seeds=range(lanes // 2), dropout_rate=RATES)
        programs[f"sweep, {lanes} lanes"] = lambda run=together, lanes=lanes: harness.second_epoch(run) / lanes
    memory: dict[str, harness.Row] = {}
    for name, program in programs.items():
        program()
        if stats := jax.devices()[0].memory_stats():
            memory[name] = {"JAX's peak on the device so far (MiB)": stats["peak_bytes_in_use"] / 2**20}
    seconds = harness.take_turns(programs, flags.repetitions)
    rows: list[harness.Row] = []
    for name, runs in seconds.items():
        row = {"program": name, **harness.spread(runs)}
        row["models x images/s"] = len(train.labels) / row["median (s)"]
        ratios = {f"/ {other}": harness.ratio(runs, seconds[other]) for other in others}
        rows.append(row | ratios | memory.get(name, {}))
    harness.write("lanes", rows, flags=flags, jax_devices=jax.device_count())


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
