"""What does it cost to save a checkpoint after each epoch? `fit` and a sweep of eight lanes, with and without."""

import dataclasses
import tempfile
from functools import partial

import jax

from benchmarks import harness
from fashion_jax import fit, load, sweep, use_all_cores


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    epochs: int = 4  # Epochs of a run.


def saved(run: partial) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(checkpoint=folder)


def main(flags: Flags) -> None:
    use_all_cores()
    train, test = load()
    runs = {
        "fit": partial(fit, train, test, key=jax.random.key(0), dropout_rate=0.2, epochs=flags.epochs),
        "sweep, 8 lanes": partial(sweep, train, test, seeds=range(4), dropout_rate=(0.0, 0.2), epochs=flags.epochs),
    }
    rows: list[harness.Row] = []
    for name, run in runs.items():
        seconds = harness.alternate({"without": run, "with": partial(saved, run)}, flags.repetitions)
        rows += [{"program": f"{name}, {kind} checkpoints", **harness.spread(of)} for kind, of in seconds.items()]
        rows[-1]["share added (median)"] = harness.ratio(seconds["with"], seconds["without"]) - 1
    harness.write("saving", rows, flags=flags)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
