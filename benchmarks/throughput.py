"""How many images per second does each program train? PyTorch's loops against JAX's, one process, in turns."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.reference import CompiledLoop, FastLoop, GraphLoop, HandLoop, MaskedLoop, TutorialLoop
from fashion_jax import Batch, TrainConfig, fit
from fashion_jax.devices import COMPILER_OPTIONS
from fashion_jax.report import read_curves
from fashion_jax.train import Data, evaluate, init_state, train_epoch, train_step

RATE = 0.2
EAGER, TUTORIAL = "PyTorch, in memory, fused Adam", "PyTorch, the tutorial's loop"
COMPILED, BY_HAND = "PyTorch, one compiled function a step", "PyTorch, gradients by hand"
GRAPH = "PyTorch, the same, as a CUDA graph"
CURVES = harness.ROOT / "tests" / "reference" / "pytorch_curves.csv"
# Beyond the range of three reference runs: about three standard deviations between seeds.
SLACK = 0.010
# At other batch sizes there are no reference runs; all programs must then agree with PyTorch's best.
AGREEMENT = 0.03


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    device: Literal["cpu", "gpu"] = "cpu"  # Where both sides run.
    batch_sizes: tuple[int, ...] = (64, 4096)  # Examples in a step.
    tutorial: bool = True  # Time the tutorial's own loop as well; it is slow.
    compile: bool = True  # Time PyTorch with torch.compile as well; it takes about a minute to compile.


class Turn(NamedTuple):
    """The epoch's mean batch loss, seconds of its training alone, and of training and both evaluations of `fit`."""

    loss: float
    training: float
    both: float


class Program:
    """Trains for an epoch, and evaluates, when it is its turn."""

    def epoch(self) -> float: ...

    def evaluate(self) -> object: ...

    def turn(self) -> Turn:
        loss, training = harness.timed(self.epoch)
        _, evaluation = harness.timed(self.evaluate)
        return Turn(loss, training, training + evaluation)


class Torch(Program):
    """A PyTorch loop."""

    def __init__(self, loop: TutorialLoop | FastLoop, data: Sequence[Any]):
        self.loop, self.epoch, self.parts = loop, loop.epoch, [loop.prepare(part) for part in data[1:]]

    def evaluate(self) -> object:
        return [self.loop.evaluate(part) for part in self.parts]


class JaxSteps(Program):
    """One jitted call per step, driven from Python."""

    def __init__(self, config: TrainConfig, data: Data):
        self.config, self.data, self.key = config, jax.device_put(data), jax.random.key(0)
        self.state = init_state(self.key, config=config)

    def epoch(self) -> float:
        self.key, order_key, dropout_key = jax.random.split(self.key, 3)
        # On the host, where it costs little to take a part of it.
        order = np.asarray(jax.random.permutation(order_key, len(self.data.train.labels)))
        losses = []
        for step, start in enumerate(range(0, len(order), self.config.batch_size)):
            rows = order[start : start + self.config.batch_size]
            self.state, loss = _step(self.state, self.data.train, rows, dropout_key, step, config=self.config)
            losses.append(loss)
        return jnp.stack(losses).mean().item()

    def evaluate(self) -> object:
        return jax.device_get([evaluate(self.state.params, part, config=self.config) for part in self.data[1:]])


# With the choice of the examples in it, and the old state's memory for the new one.
@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _step(state, train, rows, key, step, *, config):
    batch = Batch(train.images[rows], train.labels[rows])
    state, metrics = train_step(state, batch, jax.random.fold_in(key, step), config=config, dropout_rate=RATE)
    return state, metrics.loss


class JaxFit(Program):
    """An epoch as one program, compiled as in `fit`, which has both evaluations in it."""

    program = staticmethod(jax.jit(train_epoch, static_argnames="config", compiler_options=COMPILER_OPTIONS))

    def __init__(self, config: TrainConfig, data: Data):
        self.config, self.train, self.key = config, jax.device_put(data.train), jax.random.key(0)
        self.state = init_state(self.key, config=config)
        self.fit = partial(fit, data.train, data.validation, key=self.key, config=config, dropout_rate=RATE)

    def epoch(self) -> float:
        self.state, losses = self.program(self.state, self.train, self.key, config=self.config, dropout_rate=RATE)
        return losses.mean().item()

    def turn(self) -> Turn:
        return Turn(*harness.timed(self.epoch), harness.second_epoch(self.fit))


def band(batch_size: int, best: float) -> tuple[float, float]:
    """Return where the first epoch's loss has to lie, given that of PyTorch's best."""
    if batch_size != 64:
        return best * (1 - AGREEMENT), best * (1 + AGREEMENT)
    first = np.asarray(read_curves(CURVES)[RATE].running_loss)[:, 0]
    return first.min().item() - SLACK, first.max().item() + SLACK


def makers(flags: Flags, data: Data, size: int, device: str) -> Mapping[str, Callable[[], Program]]:
    """Return the constructor of each program, by name."""
    config, loop = TrainConfig(batch_size=size), {"dropout_rate": RATE, "batch_size": size, "device": device}
    loops = {
        EAGER: (True, FastLoop, loop),
        "PyTorch, the same, compiled": (flags.compile, FastLoop, {**loop, "compiled": True}),
        "PyTorch, masks of an epoch at once": (True, MaskedLoop, loop),
        COMPILED: (flags.compile, CompiledLoop, loop),
        BY_HAND: (True, HandLoop, loop),
        GRAPH: (device == "cuda", GraphLoop, loop),
        "PyTorch, compiled, as a CUDA graph": (
            device == "cuda" and flags.compile,
            GraphLoop,
            {**loop, "compiled": True},
        ),
        TUTORIAL: (flags.tutorial, TutorialLoop, loop),
    }
    by_jax = {
        "JAX, fit": partial(JaxFit, config, data),
        "JAX, a jitted step at a time": partial(JaxSteps, config, data),
    }
    return by_jax | {
        name: lambda kind=kind, options=options: Torch(kind(data.train, **options), data)
        for name, (asked, kind, options) in loops.items()
        if asked
    }


def main(flags: Flags) -> None:
    # torch.compile's pool of compiling processes would stay, and disturb what is timed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    device = harness.use_device(flags.device)
    data = harness.load_data()
    rows: list[harness.Row] = []
    for size in flags.batch_sizes:
        programs = {name: make() for name, make in makers(flags, data, size, device).items()}
        first = {name: program.turn() for name, program in programs.items()}
        low, high = band(size, first[EAGER].loss)
        for name in [name for name, turn in first.items() if not low <= turn.loss <= high]:
            print(f"{name} left out: its loss is {first[name].loss:.4f}, not {low:.4f}..{high:.4f}", file=sys.stderr)
            del programs[name]
        turns = harness.take_turns({name: program.turn for name, program in programs.items()}, flags.repetitions)
        for what, attribute in (("training", "training"), ("training and evaluation", "both")):
            seconds = {name: [getattr(turn, attribute) for turn in runs] for name, runs in turns.items()}
            rivals = [name for name in seconds if name.startswith("PyTorch") and name not in (TUTORIAL, BY_HAND)]
            best = min(rivals, key=lambda name: np.median(seconds[name]))
            for name, runs in seconds.items():
                row: harness.Row = {"batch size": size, "what": what, "program": name}
                row |= {"loss after 1 epoch": first[name].loss, **harness.spread(runs)}
                row |= {"images/s": len(data.train.labels) / row["median (s)"], "first epoch (s)": first[name].training}
                row["x PyTorch at its best"] = harness.ratio(seconds[best], runs)
                if BY_HAND in seconds:
                    row["x gradients by hand"] = harness.ratio(seconds[BY_HAND], runs)
                if TUTORIAL in seconds:
                    row["x the tutorial's loop"] = harness.ratio(seconds[TUTORIAL], runs)
                rows.append(row)
    harness.write("throughput", rows, flags=flags, dropout_rate=RATE)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
