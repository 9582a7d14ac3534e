"""What do matrix products in bfloat16 cost in accuracy, and what do they save? Both types, the same seeds, in turns."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from benchmarks import harness
from fashion_jax import TrainConfig, evidence, load
from fashion_jax.data import hold_out
from fashion_jax.sweep import sweep, use_all_cores
from fashion_jax.train import init_state, train_epoch

TYPES = {"float32": None, "bfloat16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Flags:
    widths: tuple[int, ...] = (256, 1024)
    """Units of both hidden layers, of the networks that are timed."""
    width: int = 256
    """Units of both hidden layers, of the networks that are trained to the end."""
    batch_size: int = 256
    """Examples of a training step."""
    rate: float = 0.2
    """Dropout rate of all networks, in [0, 1)."""
    seeds: int = 8
    """Number of seeds that are trained to the end."""
    epochs: int = 20
    """Passes of these over the training set."""
    repetitions: int = 5
    """Timed training epochs of each program, in turns."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


def main(flags: Flags) -> None:
    use_all_cores()
    train, _ = load(flags.data_dir)
    # The test set has no part in a choice of numbers' types.
    train, validation = hold_out(train, 1 / 6, key=jax.random.key(0))

    def config(width: int, dtype: str | None) -> TrainConfig:
        return TrainConfig(hidden=(width, width), batch_size=flags.batch_size, learning_rate=0.001, dtype=dtype)

    key = jax.random.key(0)
    on_device = jax.tree.map(jax.numpy.asarray, train)
    programs = {}
    for width in flags.widths:
        for name, dtype in TYPES.items():
            state = init_state(key, config=config(width, dtype))

            def epoch(state=state, config=config(width, dtype)) -> None:
                jax.block_until_ready(train_epoch(state, on_device, key, config=config, dropout_rate=flags.rate))

            programs[f"{width}-{width}, {name}"] = epoch
    for program in programs.values():
        program()
    seconds = harness.alternate(programs, flags.repetitions)
    rows: list[harness.Row] = [{"program": name, **harness.spread(runs)} for name, runs in seconds.items()]
    for plain, half in zip(rows[::2], rows[1::2], strict=True):
        half["x float32"] = plain["median (s)"] / half["median (s)"]

    measured = [
        sweep(
            train,
            validation,
            seeds=range(flags.seeds),
            dropout_rates=[flags.rate],
            config=config(flags.width, dtype),
            epochs=flags.epochs,
        ).history.validation
        for dtype in TYPES.values()
    ]
    accuracy, loss = (np.array([getattr(of, field)[0, :, -1] for of in measured]) for field in ("accuracy", "loss"))
    figure = harness.bars(
        rows, label="program", value="median (s)", low="min (s)", high="max (s)", unit="seconds per training epoch"
    )
    differences = {
        "accuracy, bfloat16 minus float32": str(evidence.paired(accuracy[1], accuracy[0])),
        "loss, bfloat16 minus float32": str(evidence.paired(loss[1], loss[0])),
    }
    for name, difference in differences.items():
        print(f"{flags.seeds} seeds, hold-out {name}: {difference}")
    harness.write(
        "dtype",
        rows,
        flags=flags,
        output=flags.output,
        figure=figure,
        accuracy=dict(zip(TYPES, accuracy.tolist(), strict=True)),
        loss=dict(zip(TYPES, loss.tolist(), strict=True)),
        differences=differences,
    )


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
