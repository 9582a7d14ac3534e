"""What does a model cost when many train as one program? Sweeps of several sizes against `fit` and against PyTorch."""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Literal

import jax
import torch
import tyro

from benchmarks import harness
from benchmarks.reference import FastLoop, GraphLoop
from fashion_jax import TrainConfig, fit, load
from fashion_jax.sweep import sweep, use_all_cores
from fashion_jax.train import train_eval_part

RATES = (0.0, 0.2)


@dataclasses.dataclass(frozen=True)
class Flags:
    device: Literal["cpu", "gpu"] = "cpu"
    """Where both sides run."""
    lanes: tuple[int, ...] = (2, 16)
    """Lanes of each sweep, even numbers: half of them without dropout, half with 0.2."""
    repetitions: int = 4
    """Timed epochs of each program, in turns; each run starts with an epoch that is not timed."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


class OnEachCore:
    """PyTorch's fastest loop on each core, in a process of its own with one thread: many models the quickest way."""

    def __init__(self, data_dir: Path | None):
        # Forked, a process would share the threads that JAX and PyTorch believe to have.
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        # A Ctrl-C in a terminal is this process's to tell of; what it ignores, those that it starts ignore from the
        # beginning, and when it has ended, they have nothing more to receive.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for core in sorted(os.sched_getaffinity(0)):
                ours, theirs = context.Pipe()
                context.Process(target=_train_on, args=(core, theirs, data_dir), daemon=True).start()
                theirs.close()
                self.connections.append(ours)
        finally:
            signal.signal(signal.SIGINT, before)
        self.losses: list[float | None] = self._answers()

    def epoch(self) -> float:
        """Train an epoch with both evaluations in each process; return the seconds a model."""
        start = time.perf_counter()
        for connection in self.connections:
            connection.send(None)
        self.losses = self._answers()
        return (time.perf_counter() - start) / len(self.connections)

    def _answers(self) -> list[float | None]:
        try:
            return [connection.recv() for connection in self.connections]
        except EOFError:
            raise ChildProcessError("a process of PyTorch on one core ended before its time; see above") from None


def _train_on(core: int, connection: Connection, data_dir: Path | None) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    train, test = load(data_dir)
    loop = FastLoop(train, dropout_rate=0.2, seed=core)
    parts = [loop.prepare(part) for part in (train_eval_part(train, TrainConfig()), test)]
    with contextlib.suppress(EOFError, OSError):
        loss = None
        while True:
            connection.send(loss)
            connection.recv()
            loss = loop.epoch()
            for part in parts:
                loop.evaluate(part)


def main(flags: Flags) -> None:
    if any(lanes % 2 for lanes in flags.lanes):
        raise ValueError(f"--lanes must be even: half of them train without dropout; got {flags.lanes}")
    torch_device = harness.use_device(flags.device)
    if flags.device == "cpu":
        use_all_cores()
    train, test = load(flags.data_dir)
    train_eval = train_eval_part(train, TrainConfig())
    clock: list[float] = []

    def tick(_):
        clock.append(time.perf_counter())

    def second_epoch(train_two_epochs) -> float:
        clock.clear()
        train_two_epochs()
        if len(clock) < 2:
            # The run took note of a Ctrl-C, and gave what it had.
            raise KeyboardInterrupt
        return clock[1] - clock[0]

    def alone() -> float:
        return second_epoch(lambda: fit(train, test, key=jax.random.key(0), dropout_rate=0.2, epochs=2, on_epoch=tick))

    def together(lanes: int) -> float:
        seeds = range(lanes // 2)
        run = {"seeds": seeds, "dropout_rates": RATES, "epochs": 2, "on_epoch": tick}
        return second_epoch(lambda: sweep(train, test, **run)) / lanes

    def by(loop: FastLoop) -> Callable[[], float]:
        parts = [loop.prepare(part) for part in (train_eval, test)]

        def epoch() -> float:
            start = time.perf_counter()
            loop.epoch()
            for part in parts:
                loop.evaluate(part)
            return time.perf_counter() - start

        return epoch

    programs = {"PyTorch, in memory, fused Adam": by(FastLoop(train, dropout_rate=0.2, device=torch_device))}
    if flags.device == "gpu":
        programs["PyTorch, the same, as a CUDA graph"] = by(GraphLoop(train, dropout_rate=0.2, device=torch_device))
    else:
        programs["PyTorch, the same, a process on each core"] = OnEachCore(flags.data_dir).epoch
    others = (*programs, "fit")
    programs["fit"] = alone
    programs |= {f"sweep, {lanes} lanes": lambda lanes=lanes: together(lanes) for lanes in flags.lanes}
    memory: dict[str, harness.Row] = {}
    for name, program in programs.items():
        program()
        memory[name] = {"peak memory so far (MiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if stats := jax.devices()[0].memory_stats():
            memory[name]["JAX's peak on the device so far (MiB)"] = stats["peak_bytes_in_use"] / 2**20
    seconds = harness.take_turns(programs, flags.repetitions)

    rows: list[harness.Row] = []
    for name, runs in seconds.items():
        ratios = {
            f"/ {other}": harness.statistics.median(a / b for a, b in zip(runs, seconds[other], strict=True))
            for other in others
        }
        rows.append(
            {
                "program": name,
                **harness.spread(runs),
                "models x images/s": len(train.labels) / harness.spread(runs)["median (s)"],
                **ratios,
                **memory[name],
            }
        )
    figure = harness.bars(
        rows, label="program", value="median (s)", low="min (s)", high="max (s)", unit="seconds per model and epoch"
    )
    harness.write("lanes", rows, flags=flags, output=flags.output, figure=figure, jax_devices=jax.device_count())


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    harness.start(main, Flags, __doc__)
