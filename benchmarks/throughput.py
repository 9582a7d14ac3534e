"""How many images a second does each program train? PyTorch's loops against JAX's, one process, in turns."""

import csv
import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from benchmarks import harness
from benchmarks.reference import FastLoop, GraphLoop, TutorialLoop
from fashion_jax import Batch, TrainConfig, load
from fashion_jax.train import (
    evaluate,
    init_state,
    start_lane,
    train_and_evaluate_epoch,
    train_epoch,
    train_eval_part,
    train_step,
)

RATE = 0.2
EAGER, TUTORIAL = "PyTorch, in memory, fused Adam", "PyTorch, the tutorial's loop"
CURVES = Path(__file__).parents[1] / "tests" / "reference" / "pytorch_curves.csv"
# Beyond the range of three reference runs: about three standard deviations between seeds.
SLACK = 0.010
# At other batch sizes there are no reference runs; all programs must then agree with PyTorch's best.
AGREEMENT = 0.03


@dataclasses.dataclass(frozen=True)
class Flags:
    device: Literal["cpu", "gpu"] = "cpu"
    """Where both sides run."""
    batch_sizes: tuple[int, ...] = (64, 4096)
    """Examples in a step."""
    repetitions: int = 4
    """Timed epochs of each program, in turns, after one that is not timed."""
    tutorial: bool = True
    """Time the tutorial's own loop as well; it is slow."""
    compile: bool = True
    """Time PyTorch with torch.compile as well; it takes about a minute to compile."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


class Turn(NamedTuple):
    """What a program did in its turn.

    Attributes:
        loss: Mean of the batch losses of the epoch.
        training: Seconds of an epoch's training alone.
        both: Seconds of an epoch's training and the two evaluations that `fit` makes.
    """

    loss: float
    training: float
    both: float


class Program(Protocol):
    """Trains for an epoch and evaluates, each time that it is its turn."""

    def turn(self) -> Turn: ...


class Torch:
    """A PyTorch loop."""

    def __init__(self, loop: TutorialLoop | FastLoop, train_eval: Batch, test: Batch):
        self.loop, self.parts = loop, [loop.prepare(part) for part in (train_eval, test)]

    def turn(self) -> Turn:
        loss, training = harness.timed(self.loop.epoch)
        _, evaluation = harness.timed(lambda: [self.loop.evaluate(part) for part in self.parts])
        return Turn(loss, training, training + evaluation)


class JaxSteps:
    """One jitted call a step, driven from Python."""

    def __init__(self, train: Batch, train_eval: Batch, test: Batch, config: TrainConfig):
        self.train, self.parts, self.config = train, (train_eval, test), config
        self.key = jax.random.key(0)
        self.state = init_state(self.key, config=config)

    def turn(self) -> Turn:
        loss, training = harness.timed(self._epoch)
        _, evaluation = harness.timed(self._evaluate)
        return Turn(loss, training, training + evaluation)

    def _epoch(self) -> float:
        self.key, order_key, dropout_key = jax.random.split(self.key, 3)
        # On the host, where it costs little to take a part of it.
        order = np.asarray(jax.random.permutation(order_key, len(self.train.labels)))
        losses = []
        for step, start in enumerate(range(0, len(order), self.config.batch_size)):
            rows = order[start : start + self.config.batch_size]
            self.state, loss = _step(self.state, self.train, rows, dropout_key, step, config=self.config)
            losses.append(loss)
        return jnp.stack(losses).mean().item()

    def _evaluate(self) -> object:
        return jax.device_get([evaluate(self.state.params, part, config=self.config) for part in self.parts])


# With the choice of the examples in it, and the old state's memory for the new one.
@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _step(state, train, rows, key, step, *, config):
    batch = Batch(train.images[rows], train.labels[rows])
    state, metrics = train_step(state, batch, jax.random.fold_in(key, step), config=config, dropout_rate=RATE)
    return state, metrics.loss


class JaxFit:
    """What `fit` runs: an epoch as one compiled program. With both evaluations it is another, for one more epoch."""

    def __init__(self, train: Batch, train_eval: Batch, test: Batch, config: TrainConfig):
        self.data, self.config = (train, train_eval, test), config
        self.key = jax.random.key(0)
        self.lane = start_lane(init_state(self.key, config=config))

    def turn(self) -> Turn:
        loss, training = harness.timed(self._epoch)
        _, both = harness.timed(self._epoch_and_evaluations)
        return Turn(loss, training, both)

    def _epoch(self) -> float:
        state, losses = train_epoch(self.lane.state, self.data[0], self.key, config=self.config, dropout_rate=RATE)
        self.lane = self.lane._replace(state=state)
        return losses.mean().item()

    def _epoch_and_evaluations(self) -> object:
        self.lane, outcome = train_and_evaluate_epoch(
            self.lane, *self.data, self.key, config=self.config, dropout_rate=RATE
        )
        return jax.device_get(outcome)


def band(batch_size: int, best: float) -> tuple[float, float]:
    """Tell where the first epoch's loss has to lie."""
    if batch_size != 64:
        return best * (1 - AGREEMENT), best * (1 + AGREEMENT)
    with CURVES.open() as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] == "1" and float(row["dropout_rate"]) == RATE]
    losses = [float(row["running_train_loss"]) for row in rows]
    return min(losses) - SLACK, max(losses) + SLACK


def main(flags: Flags) -> None:
    torch_device = harness.use_device(flags.device)
    splits = load(flags.data_dir)
    train_eval = train_eval_part(splits.train, TrainConfig())
    train, train_eval_there, test = jax.tree.map(jnp.array, (splits.train, train_eval, splits.test))
    n = len(splits.train.labels)

    rows: list[harness.Row] = []
    for size in flags.batch_sizes:
        config = TrainConfig(batch_size=size)
        shared = {"dropout_rate": RATE, "batch_size": size, "device": torch_device}
        loops: dict[str, Callable[[], TutorialLoop | FastLoop]] = {EAGER: partial(FastLoop, splits.train, **shared)}
        if flags.compile:
            loops["PyTorch, the same, compiled"] = partial(FastLoop, splits.train, **shared, compiled=True)
        if flags.device == "gpu":
            loops["PyTorch, the same, as a CUDA graph"] = partial(GraphLoop, splits.train, **shared)
        if flags.device == "gpu" and flags.compile:
            loops["PyTorch, compiled, as a CUDA graph"] = partial(GraphLoop, splits.train, **shared, compiled=True)
        if flags.tutorial:
            loops[TUTORIAL] = partial(TutorialLoop, splits.train, **shared)
        makers: dict[str, Callable[[], Program]] = {
            "JAX, fit": partial(JaxFit, train, train_eval_there, test, config),
            "JAX, a jitted step at a time": partial(JaxSteps, train, train_eval_there, test, config),
        }
        for name, loop in loops.items():
            makers[name] = lambda loop=loop: Torch(loop(), train_eval, splits.test)
        programs, first = {}, {}
        for name, make in makers.items():
            programs[name] = make()
            first[name] = programs[name].turn()
        low, high = band(size, first[EAGER].loss)
        trains = {name: low <= turn.loss <= high for name, turn in first.items()}
        turns = harness.take_turns(
            {name: program.turn for name, program in programs.items() if trains[name]}, flags.repetitions
        )
        for what, attribute in (("training", "training"), ("training and evaluation", "both")):
            seconds = {name: [getattr(turn, attribute) for turn in runs] for name, runs in turns.items()}
            for name, turn in first.items():
                row: harness.Row = {"batch size": size, "what": what, "program": name, "loss after 1 epoch": turn.loss}
                if not trains[name]:
                    rows.append(row | {"refused": f"its loss is outside {low:.4f}..{high:.4f}"})
                    continue
                timing = harness.spread(seconds[name])
                row |= {"images/s": n / timing["median (s)"], **timing, "first epoch (s)": turn.training}
                others = [name for name in seconds if name.startswith("PyTorch") and name != TUTORIAL]
                # Pair by pair, so that a drift of the machine cancels.
                best = min(others, key=lambda name: harness.spread(seconds[name])["median (s)"])
                row["x PyTorch at its best"] = _ratio(seconds[best], seconds[name])
                if TUTORIAL in seconds:
                    row["x the tutorial's loop"] = _ratio(seconds[TUTORIAL], seconds[name])
                rows.append(row)
    drawn = [row | {"name": f"{row['program']}, batch {row['batch size']}"} for row in rows if "images/s" in row]
    drawn = [row for row in drawn if row["what"] == "training"]
    figure = harness.bars(
        drawn, label="name", value="median (s)", low="min (s)", high="max (s)", unit="seconds per training epoch"
    )
    harness.write("throughput", rows, flags=flags, output=flags.output, figure=figure, dropout_rate=RATE)


def _ratio(others: list[float], ours: list[float]) -> float:
    return harness.statistics.median(other / our for other, our in zip(others, ours, strict=True))


if __name__ == "__main__":
    # torch.compile's pool of compiling processes would stay, and disturb what is timed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    harness.start(main, Flags, __doc__)
