"""Do whole runs agree? 30 epochs, many seeds, both arms, on both sides: means and intervals of six figures."""

import dataclasses
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
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(FIGURES))
    for i, (name, axes) in enumerate(zip(FIGURES, panels, strict=True)):
        axes.set_title(name, fontsize=9)
        axes.set_xticks([0, 1, 3, 4], labels=["JAX", "PyTorch", "JAX", "PyTorch"], fontsize=7)
        axes.set_xlabel("no dropout          dropout 0.2", fontsize=8)
        for arm, title in enumerate(("no dropout", "dropout 0.2")):
            row: harness.Row = {"arm": title, "figure": name}
            for side, label in enumerate(("JAX", "PyTorch")):
                mean, half = interval(measured[side, arm, :, i])
                row |= {
                    f"{label}": f"{mean:.4f} ± {half:.4f}",
                    f"{label} sd": f"{measured[side, arm, :, i].std(ddof=1):.4f}",
                }
                position = 3 * arm + side
                axes.plot([position] * flags.seeds, measured[side, arm, :, i], "o", color="#7a93b5", markersize=4)
                axes.errorbar([position + 0.25], [mean], yerr=[half], fmt="s", color="black", capsize=3, markersize=4)
            welch: Any = stats.ttest_ind(measured[0, arm, :, i], measured[1, arm, :, i], equal_var=False)
            low, high = welch.confidence_interval(0.95)
            row |= {"difference, 95% interval": f"{low:+.4f}..{high:+.4f}", "p (Welch)": f"{welch.pvalue:.2f}"}
            rows.append(row)
    harness.write(
        "distribution",
        rows,
        flags=flags,
        output=flags.output,
        figure=figure,
        figures=FIGURES,
        measured=measured.tolist(),
    )


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
