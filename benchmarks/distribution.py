"""Do whole runs agree? 30 epochs, many seeds, both arms, on both sides: means and intervals of three figures."""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import sys
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from benchmarks import harness
from benchmarks.reference import FastLoop
from fashion_jax import load, sweep, use_all_cores
from fashion_jax.statistics import interval

FIGURES = ("running training loss", "test loss", "test accuracy")
ARMS = {"no dropout": 0.0, "dropout 0.2": 0.2}
LAST = 5


@dataclasses.dataclass(frozen=True)
class Flags(harness.Flags):
    seeds: int = 32  # Runs of each arm on each side.
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


def by_jax(flags: Flags) -> np.ndarray:
    """Train all runs as one sweep; return [arms, seeds, figures]."""
    result = sweep(
        *load(), seeds=range(flags.seeds), dropout_rate=tuple(ARMS.values()), epochs=flags.epochs, progress=True
    )
    running, validation = result.history.running_loss, result.history.validation
    return np.stack([curve[..., -LAST:].mean(axis=-1) for curve in (running, *validation[:2])], axis=-1)


def by_torch(flags: Flags) -> np.ndarray:
    """Train each run by a loop of its own, as many at a time as there are cores; return [arms, seeds, figures]."""
    runs = list(itertools.product(ARMS.values(), range(flags.seeds)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(harness.cores()), context, torch.set_num_threads, (1,)) as pool:
        means = []
        for mean in pool.map(_train, *zip(*runs, strict=True), itertools.repeat(flags.epochs)):
            means.append(mean)
            print(f"PyTorch: {len(means)} of {len(runs)} runs", file=sys.stderr, flush=True)
    return np.reshape(means, (len(ARMS), flags.seeds, len(FIGURES)))


def _train(rate: float, seed: int, epochs: int) -> np.ndarray:
    train, test = load()
    loop = FastLoop(train, dropout_rate=rate, seed=seed)
    batches = loop.prepare(test)
    return np.mean([(loop.epoch(), *loop.evaluate(batches)) for _ in range(epochs)][-LAST:], axis=0)


def main(flags: Flags) -> None:
    if flags.seeds < 2:
        raise ValueError(f"--seeds must be at least 2, for an interval; got {flags.seeds}")
    use_all_cores()
    harness.load_data()  # Fetched once, if it has to be.
    # [side, arm, seed, figure], means over the last epochs
    measured = np.stack([by_jax(flags), by_torch(flags)])

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
