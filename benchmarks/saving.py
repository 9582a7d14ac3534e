"""What does it cost to save a checkpoint after each epoch? `fit` and a sweep of eight lanes, with and without."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Annotated

import jax
import tyro

from benchmarks import harness
from fashion_jax import fit, load
from fashion_jax.sweep import sweep, use_all_cores


@dataclasses.dataclass(frozen=True)
class Flags:
    repetitions: int = 5
    """Timed runs of each program, in turns."""
    epochs: int = 4
    """Epochs of a run."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


def main(flags: Flags) -> None:
    use_all_cores()
    train, test = load(flags.data_dir)
    options = {"epochs": flags.epochs}
    programs = {
        "fit": lambda **more: fit(train, test, key=jax.random.key(0), dropout_rate=0.2, **options, **more),
        "sweep, 8 lanes": lambda **more: sweep(
            train, test, seeds=range(4), dropout_rates=(0.0, 0.2), **options, **more
        ),
    }
    rows: list[harness.Row] = []
    for name, program in programs.items():

        def saved(program=program) -> float:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                program(checkpoint=Path(folder) / "run")
                return time.perf_counter() - start

        def unsaved(program=program) -> float:
            start = time.perf_counter()
            program()
            return time.perf_counter() - start

        for warm_up in (unsaved, saved):
            warm_up()
        pairs = [(unsaved(), saved()) for _ in range(flags.repetitions)]
        for kind, runs in zip(("without", "with"), zip(*pairs, strict=True), strict=True):
            rows.append({"program": f"{name}, {kind} checkpoints", **harness.spread(list(runs))})
        shares = [after / before - 1 for before, after in pairs]
        rows[-1]["share added (median)"] = harness.statistics.median(shares)
    figure = harness.bars(
        rows,
        label="program",
        value="median (s)",
        low="min (s)",
        high="max (s)",
        unit=f"seconds for {flags.epochs} epochs",
    )
    harness.write("saving", rows, flags=flags, output=flags.output, figure=figure)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
