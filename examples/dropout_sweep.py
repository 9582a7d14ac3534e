"""When does dropout help? Rates against training-set sizes: rates chosen on a hold-out, then tested once."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from fashion_jax import Progress, evaluate, hold_out, load, report, subset, sweep, use_all_cores
from fashion_jax.evidence import Summary, summarize
from fashion_jax.script import TrainingFlags, exit_if_interrupted, flag, logger, publish, run_script
from fashion_jax.statistics import paired


@dataclasses.dataclass(frozen=True)
class Flags(TrainingFlags):
    rates: tuple[float, ...] = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)  # Dropout rates in [0, 1); the first is the baseline.
    sizes: tuple[int, ...] = (1_000, 5_000, 20_000, 50_000)  # Training-set sizes, at most 50,000.
    seeds: int = 3  # Number of seeds, from 0.
    epochs: int = 30  # Passes over the training set, whatever its size.
    distributed: bool = False  # Train together with the other tasks of a SLURM or Open MPI job, or of a TPU slice.
    output: Path = Path("runs/dropout_sweep")  # Directory to write to.


def main(flags: Flags) -> None:
    use_all_cores()
    train, test = load(data_dir=flags.data_dir)
    train, validation = hold_out(train, 1 / 6, key=jax.random.key(0))
    with flag("--sizes"):
        parts = {size: subset(train, size, key=jax.random.key(0)) for size in sorted(flags.sizes)}
    heading = ["images", "chosen rate", "test loss, chosen minus first", "test accuracy, chosen minus first"]
    losses, tests = [["images", *(f"dropout {rate:g}" for rate in flags.rates)]], [heading]
    histories, tested = {}, {}
    for size, part in parts.items():
        logger.info("%d training images", size)
        result = sweep(
            part,
            validation,
            seeds=range(flags.seeds),
            epochs=flags.epochs,
            callbacks=[Progress()],
            checkpoint=flags.checkpoint and flags.checkpoint / f"{size}-images",
            dropout_rate=flags.rates,
        )
        exit_if_interrupted(result.history, flags.epochs)
        histories[f"{size} images"] = result.history
        final = {rate: result.at(dropout_rate=rate).history.validation.loss[:, -1] for rate in flags.rates}
        losses.append([f"{size:,}", *map(report.mean_and_std, final.values())])
        chosen = min(final, key=lambda rate: final[rate].mean())
        one, first = (evaluate(result.at(dropout_rate=rate).state.params, test) for rate in (chosen, flags.rates[0]))
        tested[f"{size} images"] = {"chosen rate": chosen, "chosen": one, "first": first}
        differences = [str(paired(*both)) if chosen != flags.rates[0] else "-" for both in zip(one, first, strict=True)]
        tests.append([f"{size:,}", f"{chosen:g}", *differences])
    about = "Test set, touched once, at the rate with the lowest hold-out loss (mean and 95% interval over the seeds):"
    tables = {"Hold-out loss (nats) after the last epoch:": losses, about: tests}
    figure = draw({name: summarize(history) for name, history in histories.items()}, flags.rates)
    publish(flags, tables, {"study": figure}, history={"arms": histories, "test": tested})


def draw(arms: Mapping[str, Summary], rates: tuple[float, ...]) -> Figure:
    """Draw final loss, gap and accuracy against the rate, and how far each loss is above the lowest of its size."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    *panels, last = figure.subplots(2, 2).flat
    labels = {"final_loss": "validation loss (nats)", "gap": "gap (eval mode, nats)", "final_accuracy": "accuracy"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for i, (title, summary) in enumerate(arms.items()):
            # From light to dark, so that the order survives gray printing.
            color, runs = colormaps["viridis_r"]((i + 1) / len(arms)), getattr(summary, name)
            axes.errorbar(rates, runs.mean(axis=1), runs.std(axis=1), capsize=3, label=title, color=color, marker="o")
        axes.set(xlabel="dropout rate", ylabel=f"final {label}")
        axes.grid(alpha=0.3)
    panels[0].legend(title="mean ± std over seeds")
    losses = np.array([summary.final_loss.mean(axis=1) for summary in arms.values()])
    above = losses - losses.min(axis=1, keepdims=True)
    for (i, j), value in np.ndenumerate(above):
        last.text(j, i, f"+{value:.2f}" if value else "★", ha="center", va="center")
    last.imshow(above, cmap="Blues", vmax=2 * above.max(), aspect="auto")
    last.set_xticks(range(len(rates)), labels=[f"{rate:g}" for rate in rates])
    last.set_yticks(range(len(arms)), labels=list(arms))
    last.set(xlabel="dropout rate", title="final loss above the lowest of its size (★)")
    return figure


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
