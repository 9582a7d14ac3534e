"""Do whole runs agree? 30 epochs, many seeds, both arms, on both sides: means and intervals of three figures."""

import dataclasses
import itertools
import sys
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks import harness
from benchmarks.reference import FastLoop
from fashion_jax import fit, load
from fashion_jax.statistics import interval

FIGURES = ("running training loss", "test loss", "test accuracy")
ARMS = {"no dropout": 0.0, "dropout 0.2": 0.2}
LAST = 5


@dataclasses.dataclass(frozen=True)
class Flags(harness.Flags):
    seeds: int = 8  # Runs of each arm on each side.
    epochs: int = 30  # Epochs of a run; the figures are means over the last five.


def draw(measured: np.ndarray) -> Figure:
    """Draw each seed's figures, and their means with 95% intervals; measured [sides, arms, seeds, figures]."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    handles: dict[str, Any] = {}
    for i, (name, axes) in enumerate(zip(FIGURES, figure.subplots(1, len(FIGURES)), strict=True)):
        axes.set_ylabel(f"{name} (nats)" if "loss" in name else name, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_xticks([0, 1, 3, 4], labels=["JAX", "PyTorch", "JAX", "PyTorch"])
        axes.set_xticks([0.5, 3.5], labels=[f"\n{arm}" for arm in ARMS], minor=True, fontsize=8)
        axes.tick_params(axis="x", which="minor", length=0, pad=9)
        for arm, side in itertools.product(range(2), range(2)):
            values, at = measured[side, arm, :, i], 3 * arm + side
            mean, low, high, *_ = interval(values)
            handles["one seed"] = axes.plot([at] * len(values), values, "o", color="#7a93b5", markersize=4)[0]
            around, style = [[mean - low], [high - mean]], {"fmt": "s", "capsize": 3, "markersize": 4}
            handles["mean, 95% interval"] = axes.errorbar([at + 0.25], [mean], yerr=around, color="black", **style)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def main(flags: Flags) -> None:
    if flags.seeds < 2:
        raise ValueError(f"--seeds must be at least 2, for an interval; got {flags.seeds}")
    train, test = load()
    # [side, arm, seed, figure], means over the last epochs
    measured = np.empty((2, 2, flags.seeds, len(FIGURES)))
    for seed, (arm, rate) in itertools.product(range(flags.seeds), enumerate(ARMS.values())):
        history = fit(train, test, key=jax.random.key(seed), dropout_rate=rate, epochs=flags.epochs).history
        measured[0, arm, seed] = [curve[-LAST:].mean() for curve in (history.running_loss, *history.validation[:2])]
        loop = FastLoop(train, dropout_rate=rate, seed=seed)
        batches = loop.prepare(test)
        curves = [(loop.epoch(), *loop.evaluate(batches)) for _ in range(flags.epochs)]
        measured[1, arm, seed] = np.mean(curves[-LAST:], axis=0)
        print(f"seed {seed}, dropout {rate:g}", file=sys.stderr, flush=True)

    rows: list[harness.Row] = []
    for (i, name), (arm, title) in itertools.product(enumerate(FIGURES), enumerate(ARMS)):
        row: harness.Row = {"arm": title, "figure": name}
        for side, values in zip(("JAX", "PyTorch"), measured[:, arm, :, i], strict=True):
            row |= {side: str(interval(values)).lstrip("+"), f"{side} std": f"{values.std(ddof=1):.4f}"}
        welch: Any = stats.ttest_ind(*measured[:, arm, :, i], equal_var=False)
        low, high = welch.confidence_interval(0.95)
        rows.append(row | {"difference": f"[{low:+.4f}, {high:+.4f}]", "p (Welch)": f"{welch.pvalue:.2f}"})
    harness.write("distribution", rows, flags=flags, figure=draw(measured), figures=FIGURES, measured=measured)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
