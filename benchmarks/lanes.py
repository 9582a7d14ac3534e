"""What does a model cost when many train as one program? Sweeps of several sizes against `fit` and against PyTorch."""

import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from benchmarks import harness
from benchmarks.reference import BatchedGraphLoop, BatchedLoop, CompiledLoop, FastLoop, GraphLoop, HandLoop, in_memory
from benchmarks.throughput import BY_HAND, COMPILED, EAGER, GRAPH, Torch
from fashion_jax import TrainConfig, fit, sweep, use_all_cores
from fashion_jax.train import Data

RATES = (0.0, 0.2)  # Of both sides, half of the models each.
GRID = {
    "dropout_rate": (0.0, 0.1, 0.2, 0.5),
    "learning_rate": (0.0003, 0.001, 0.003, 0.01),
    "weight_decay": (0.0, 0.0001, 0.001, 0.01),
}
ADAMW = TrainConfig(optimizer=optax.adamw)
# What PyTorch's models beside the grid share: of its numbers, only dropout rates change what a model costs.
NUMBERS = {"learning_rate": 0.003, "weight_decay": 0.001}


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    device: Literal["cpu", "gpu"] = "cpu"  # Where both sides run.
    lanes: tuple[int, ...] = (2, 16)  # Lanes of each sweep, even numbers: half without dropout, half with 0.2.
    grid: bool = False  # Race a sweep over dropout rates, learning rates and weight decays instead; writes grid.json.
    compile: bool = True  # Time PyTorch with torch.compile as well; it takes about two minutes to compile.
    batched: bool = False  # Train PyTorch's models in one step as well, as many as a sweep has lanes.


class Program(NamedTuple):
    """How many models it trains, and what trains them for an epoch and evaluates them; that returns the seconds."""

    models: int
    run: Callable[[], float]
    warms_up: bool = False  # Each run leaves an epoch out by itself, in which it may compile.


def one_by_one(kind: Any, rates: Sequence[float], data: Sequence[Any], **options: Any) -> Program:
    """Train models of PyTorch, one of each rate, one after the other."""
    turns = [Torch(kind(data[0], dropout_rate=rate, **options), data).turn for rate in rates]
    return Program(len(rates), lambda: sum(turn().both for turn in turns))


class OnEachCore:
    """A process on each core with one thread, in which models of PyTorch train one after the other."""

    def __init__(self, rates: Sequence[float], data: Data, **options: Any):
        self.models, self.connections = len(rates) * len(harness.cores()), []
        # Forked, a process would share the threads that JAX and PyTorch believe to have.
        context = multiprocessing.get_context("spawn")
        for core in harness.cores():
            ours, theirs = context.Pipe()
            context.Process(target=_train_on, args=(core, theirs, rates, data, options), daemon=True).start()
            theirs.close()
            self.connections.append(ours)

    def program(self, kind: Any) -> Program:
        """Train a model of each rate in each process, all processes at the same time."""

        def run() -> None:
            for connection in self.connections:
                connection.send(kind)
            for connection in self.connections:
                connection.recv()

        return Program(self.models, lambda: harness.timed(run)[1])


def _train_on(core: int, connection: Any, rates: Sequence[float], data: Data, options: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    harness.use_threads(1)
    shared = [in_memory(part, "cpu") for part in data]
    program = functools.cache(lambda kind: one_by_one(kind, rates, shared, **options))
    # Raised when the process that asks has ended.
    with contextlib.suppress(EOFError):
        while True:
            connection.send(program(connection.recv()).run())


def by_torch(
    kinds: Mapping[str, Any], rates: Sequence[float], data: Data, device: str, **options: Any
) -> dict[str, Program]:
    """Return PyTorch's programs: each loop in this process and, on CPUs, in a process on each core."""
    programs, shared = {}, [in_memory(part, device) for part in data]
    processes = OnEachCore(rates, data, **options) if device == "cpu" else None
    for name, kind in kinds.items():
        programs[name] = one_by_one(kind, rates, shared, device=device, **options)
        if processes:
            where = "PyTorch, the same" if name == EAGER else name
            programs[f"{where}, a process on each core"] = processes.program(kind)
    return programs


def together(lanes: int, shared: Sequence[Any], device: str, *, compiled: bool) -> dict[str, Program]:
    """Return PyTorch's models in one step."""
    kind, recorded = (BatchedGraphLoop, ", as a CUDA graph") if device == "cuda" else (BatchedLoop, "")
    rates = RATES * (lanes // len(RATES))

    def run() -> float:
        # Anew, so that the memory of thousands of models is free for the next program.
        models = Torch(kind(shared[0], dropout_rate=rates, device=device, compiled=compiled), shared)
        models.turn()
        return models.turn().both

    name = f"PyTorch, {lanes} models in one step{', compiled' * compiled}{recorded}"
    return {name: Program(lanes, run, warms_up=True)}


def by_jax(data: Data, lanes: int, **arguments: Any) -> dict[str, Program]:
    """Return a sweep."""
    run = functools.partial(sweep, data.train, data.validation, **arguments)
    return {f"sweep, {lanes} lanes": Program(lanes, functools.partial(harness.second_epoch, run), warms_up=True)}


def race(programs: Mapping[str, Program], images: int, repetitions: int) -> list[harness.Row]:
    """Time programs in turns, and compare each with all that are not sweeps."""
    others = [name for name in programs if not name.startswith("sweep")]
    memory: dict[str, harness.Row] = {}

    def per_model(name: str) -> float:
        seconds = programs[name].run() / programs[name].models
        if stats := jax.devices()[0].memory_stats():
            memory.setdefault(name, {"JAX's peak on the device so far (MiB)": stats["peak_bytes_in_use"] / 2**20})
        return seconds

    for program in programs.values():
        if not program.warms_up:
            program.run()
    turns = harness.take_turns({name: functools.partial(per_model, name) for name in programs}, repetitions)
    rows: list[harness.Row] = []
    for name, seconds in turns.items():
        row: harness.Row = {"program": name, "models timed": programs[name].models, **harness.spread(seconds)}
        row["models x images/s"] = images / row["median (s)"]
        ratios = {f"/ {other}": harness.ratio(seconds, turns[other]) for other in others}
        rows.append(row | ratios | memory.get(name, {}))
    return rows


def main(flags: Flags) -> None:
    if any(lanes % 2 for lanes in flags.lanes):
        raise ValueError(f"--lanes must be even: half of them train without dropout; got {flags.lanes}")
    # torch.compile's pool of compiling processes would stay, and disturb what is timed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # All that JAX would reserve at its start is more than it needs, and PyTorch needs the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = harness.use_device(flags.device)
    if flags.device == "cpu":
        use_all_cores()
    data = harness.load_data()
    kinds = ({COMPILED: CompiledLoop} if flags.compile else {}) | {BY_HAND: HandLoop}
    if flags.grid:
        programs = by_torch(kinds, GRID["dropout_rate"], data, device, **NUMBERS)
        programs |= by_jax(data, math.prod(map(len, GRID.values())), seeds=[0], config=ADAMW, **GRID)
    else:
        kinds = {GRAPH: GraphLoop} if device == "cuda" else kinds
        programs = by_torch({EAGER: FastLoop, **kinds}, RATES, data, device)
        for lanes, compiled in itertools.product(flags.lanes * flags.batched, (False, True)[: 1 + flags.compile]):
            programs |= together(lanes, data, device, compiled=compiled)
        alone = functools.partial(fit, data.train, data.validation, key=jax.random.key(0), dropout_rate=0.2)
        programs["fit"] = Program(1, functools.partial(harness.second_epoch, alone), warms_up=True)
        for lanes in flags.lanes:
            programs |= by_jax(data, lanes, seeds=range(lanes // 2), dropout_rate=RATES)
    rows = race(programs, len(data.train.labels), flags.repetitions)
    harness.write("grid" if flags.grid else "lanes", rows, flags=flags, jax_devices=jax.device_count())


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
