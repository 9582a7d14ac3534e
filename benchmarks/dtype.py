"""What do matrix products in bfloat16 cost in accuracy, and what do they save? Both types, the same seeds, in turns."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from benchmarks import harness
from fashion_jax import FashionMLP, TrainConfig, hold_out, load, statistics, sweep, use_all_cores
from fashion_jax.train import init_state, train_epoch

TYPES = {"float32": None, "bfloat16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    widths: tuple[int, ...] = (256, 1024)  # Units of both hidden layers, of the networks that are timed.
    width: int = 256  # Units of both hidden layers, of the networks that are trained to the end.
    batch_size: int = 256  # Examples of a training step.
    rate: float = 0.2  # Dropout rate of all networks, in [0, 1).
    seeds: int = 8  # Number of seeds that are trained to the end.
    epochs: int = 20  # Passes of these over the training set.


def main(flags: Flags) -> None:
    use_all_cores()
    # The test set has no part in a choice of the type.
    train, validation = hold_out(load().train, 1 / 6, key=jax.random.key(0))
    key, on_device = jax.random.key(0), jax.device_put(train)
    numbers = {"dropout_rate": flags.rate, "learning_rate": 0.001}

    def config(width: int, dtype: str | None) -> TrainConfig:
        return TrainConfig(model=FashionMLP(hidden=(width, width), dtype=dtype), batch_size=flags.batch_size)

    def epoch(config: TrainConfig) -> Callable[[], object]:
        state = init_state(key, config=config, **numbers)
        return lambda: jax.block_until_ready(train_epoch(state, on_device, key, config=config, **numbers))

    programs = {
        f"{width}-{width}, {name}": epoch(config(width, dtype))
        for width in flags.widths
        for name, dtype in TYPES.items()
    }
    seconds = harness.alternate(programs, flags.repetitions)
    rows: list[harness.Row] = [{"program": name, **harness.spread(runs)} for name, runs in seconds.items()]
    for plain, half in zip(rows[::2], rows[1::2], strict=True):
        half["x float32"] = harness.ratio(plain["seconds"], half["seconds"])

    run = partial(sweep, train, validation, seeds=range(flags.seeds), epochs=flags.epochs, **numbers)
    measured = [run(config=config(flags.width, dtype)).history.validation for dtype in TYPES.values()]
    last = {name: np.array([getattr(of_type, name)[:, -1] for of_type in measured]) for name in ("accuracy", "loss")}
    differences = {
        f"{name}, bfloat16 minus float32": str(statistics.paired(half, plain)) for name, (plain, half) in last.items()
    }
    print(differences)
    by_type = {name: dict(zip(TYPES, values.tolist(), strict=True)) for name, values in last.items()}
    harness.write("dtype", rows, flags=flags, **by_type, differences=differences)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
