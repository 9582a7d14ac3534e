"""Do the verdicts hold on scikit-learn's digits? The tutorial's experiment on 1,797 images of 8x8 pixels."""

import dataclasses

import jax
import numpy as np
from sklearn.datasets import load_digits

from benchmarks import harness
from fashion_jax import Batch, Progress, hold_out, judge, sweep, use_all_cores


@dataclasses.dataclass(frozen=True)
class Flags(harness.Flags):
    seeds: int = 32  # Number of seeds, from 0.
    epochs: int = 300  # About a quarter of the tutorial's number of steps.


def main(flags: Flags) -> None:
    use_all_cores()
    pixels, labels = load_digits(return_X_y=True)
    batch = Batch((np.reshape(pixels, (-1, 8, 8)) * 255 / 16).astype(np.uint8), np.asarray(labels, np.int32))
    train, validation = hold_out(batch, 0.2, key=jax.random.key(0))
    how = {"seeds": range(flags.seeds), "dropout_rate": (0.0, 0.2), "epochs": flags.epochs, "callbacks": [Progress()]}
    result = sweep(train, validation, **how)
    verdicts = judge(*(result.at(dropout_rate=rate).history for rate in (0.0, 0.2)), name="dropout 0.2")
    rows = [
        {"claim": verdict.claim, "answer": verdict.answer, "measured (mean, 95% interval)": str(verdict.interval)}
        for verdict in verdicts
    ]
    harness.write("digits", rows, flags=flags)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
