"""Draw the pictures of README and docs from the newest record of 32 seeds, into `docs/pictures/`."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness
from benchmarks.tables import CURVES, newest, recorded_arms
from fashion_jax import judge, plot, report
from fashion_jax.types import History, Metrics

ARMS = {"no dropout": 0.0, "dropout 0.2": 0.2}


@dataclasses.dataclass(frozen=True)
class Flags:
    output: Path = harness.ROOT / "docs" / "pictures"  # Directory to write to.


def as_drawn_by_the_tutorial(history: History) -> History:
    """Return the first seed's run, without the curve that the tutorial does not have."""
    nothing = np.full(history.running_loss.shape[1], np.nan)
    return jax.tree.map(lambda leaf: leaf[0], history)._replace(train=Metrics(nothing, nothing))


def main(flags: Flags) -> None:
    arms = dict(zip(ARMS, recorded_arms(newest("seeds32/history.json")), strict=True))
    others = report.read_curves(CURVES)
    tutorial = {f"{name}: the tutorial's plot, one run": as_drawn_by_the_tutorial(arm) for name, arm in arms.items()}
    many = {f"{name}: both training losses, 32 seeds": arm for name, arm in arms.items()}
    figures = {
        "losses": plot.losses(arms, reference={name: others[rate] for name, rate in ARMS.items()}),
        "claims": plot.claims(judge(*arms.values(), name="dropout 0.2")),
        "tutorial": plot.losses(tutorial | many),
    }
    machine = report.machine(json.loads(newest("seeds32/history.json"))["environment"])
    for name, figure in figures.items():
        plot.save(figure, flags.output / f"{name}.png", note=machine)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
