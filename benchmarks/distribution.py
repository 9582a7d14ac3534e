"""Do whole runs agree? 30 epochs, many seeds, both arms, on both sides: means and intervals of six figures."""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy import stats

from benchmarks import harness
from benchmarks.reference import FastLoop
from fashion_jax import fit, load

FIGURES = ("running training loss", "test loss", "test accuracy")
LAST = 5


@dataclasses.dataclass(frozen=True)
class Flags:
    seeds: int = 8
    """Runs of each arm on each side."""
    epochs: int = 30
    """Epochs of a run; the figures are means over the last five."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


def interval(values: np.ndarray) -> tuple[float, float]:
    """Give the mean and half the width of its 95% interval (Student's t)."""
    return values.mean(), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)


def draw(measured: np.ndarray) -> Figure:
    """Draw each seed's figures, and their means with 95% intervals; measured [sides, arms, seeds, figures]."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for i, (name, axes) in enumerate(zip(FIGURES, figure.subplots(1, len(FIGURES)), strict=True)):
        axes.set_ylabel(f"{name} (nats)" if "loss" in name else name, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_xticks([0, 1, 3, 4], labels=["JAX", "PyTorch", "JAX", "PyTorch"])
        axes.set_xticks([0.5, 3.5], labels=["\nno dropout", "\ndropout 0.2"], minor=True, fontsize=8)
        axes.tick_params(axis="x", which="minor", length=0, pad=9)
        for arm, side in itertools.product(range(2), range(2)):
            values, at = measured[side, arm, :, i], 3 * arm + side
            mean, half = interval(values)
            axes.plot([at] * len(values), values, "o", color="#7a93b5", markersize=4, label="one seed")
            bar = {"fmt": "s", "color": "black", "capsize": 3, "markersize": 4}
            axes.errorbar([at + 0.25], [mean], yerr=[half], label="mean, 95% interval", **bar)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    figure.legend(first.values(), first.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def main(flags: Flags) -> None:
    if flags.seeds < 2:
        raise ValueError(f"--seeds must be at least 2, for an interval; got {flags.seeds}")
    train, test = load(flags.data_dir)
    # [side, arm, seed, figure], means over the last epochs
    measured = np.empty((2, 2, flags.seeds, len(FIGURES)))
    start = time.monotonic()
    for seed in range(flags.seeds):
        for arm, rate in enumerate((0.0, 0.2)):
            history = fit(train, test, key=jax.random.key(seed), dropout_rate=rate, epochs=flags.epochs).history
            curves = np.stack([history.running_loss, *history.validation])
            measured[0, arm, seed] = curves[:, -LAST:].mean(axis=1)
            loop = FastLoop(train, dropout_rate=rate, seed=seed)
            batches = loop.prepare(test)
            curves = np.array([(loop.epoch(), *loop.evaluate(batches)) for _ in range(flags.epochs)])
            measured[1, arm, seed] = curves[-LAST:].mean(axis=0)
            print(f"seed {seed}, dropout {rate:g}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    rows: list[harness.Row] = []
    for i, name in enumerate(FIGURES):
        for arm, title in enumerate(("no dropout", "dropout 0.2")):
            row: harness.Row = {"arm": title, "figure": name}
            for side, label in enumerate(("JAX", "PyTorch")):
                mean, half = interval(measured[side, arm, :, i])
                row |= {
                    f"{label}": f"{mean:.4f} ± {half:.4f}",
                    f"{label} sd": f"{measured[side, arm, :, i].std(ddof=1):.4f}",
                }
            welch: Any = stats.ttest_ind(measured[0, arm, :, i], measured[1, arm, :, i], equal_var=False)
            low, high = welch.confidence_interval(0.95)
            row |= {"difference, 95% interval": f"{low:+.4f}..{high:+.4f}", "p (Welch)": f"{welch.pvalue:.2f}"}
            rows.append(row)
    harness.write(
        "distribution",
        rows,
        flags=flags,
        output=flags.output,
        figure=draw(measured),
        figures=FIGURES,
        measured=measured.tolist(),
    )


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
