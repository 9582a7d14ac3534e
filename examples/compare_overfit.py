"""Train with and without dropout, several seeds each, and compare the losses: the tutorial's experiment.

Prints one table and writes losses.png, prediction.png, samples.png and history.json.
"""

import dataclasses
import io
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from fashion_jax import CLASS_NAMES, FashionMLP, Run, TrainConfig, data, files, fit, plot, report
from fashion_jax.log import Progress
from fashion_jax.train import evaluate


@dataclasses.dataclass(frozen=True)
class Flags:
    epochs: int = 30
    """Passes over the training set."""
    seeds: int = 4
    """Number of seeds; the runs use 0, 1, 2, ... and each seed trains once at every rate."""
    rates: tuple[float, ...] = (0.0, 0.2)
    """Dropout rates to compare, each in [0, 1)."""
    train_size: int | None = None
    """Training images to use, the same share of each class; all if left out."""
    holdout: float = 0.0
    """Share of the training images to validate on. 0 validates on the test set after each epoch, as the tutorial's code
    does; otherwise the test set is touched once, at the end."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set; see `python -m fashion_jax.data --help`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/compare_overfit")
    """Directory to write into."""


def main(flags: Flags) -> int:
    if flags.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {flags.seeds}")
    if not flags.rates or len(set(flags.rates)) < len(flags.rates):
        raise ValueError(f"--rates must name at least one rate, and none twice; got {flags.rates}")
    flags.output.mkdir(parents=True, exist_ok=True)
    config = TrainConfig()
    train, test = data.load(flags.data_dir)
    validation = test
    if flags.holdout:
        train, validation = data.hold_out(train, flags.holdout, key=jax.random.key(0))
    if flags.train_size is not None:
        train = data.subset(train, flags.train_size, key=jax.random.key(0))

    runs: dict[float, list[Run]] = {rate: [] for rate in flags.rates}
    status = 0
    with Progress(flags.epochs * flags.seeds * len(flags.rates)) as progress:
        try:
            for seed in range(flags.seeds):
                for rate, done in runs.items():
                    key = jax.random.key(seed)
                    done.append(
                        fit(
                            train,
                            validation,
                            key=key,
                            config=config,
                            dropout_rate=rate,
                            epochs=flags.epochs,
                            on_epoch=progress,
                        )
                    )
        except KeyboardInterrupt:
            status = 130
    seeds = list(range(min(map(len, runs.values()))))
    if status:
        print(
            f"stopped with {len(seeds)} of {flags.seeds} seeds complete; run the same command again for all of them",
            file=sys.stderr,
        )
    if not seeds:
        return status

    names = {rate: f"dropout {rate:g}" if rate else "no dropout" for rate in flags.rates}
    stacked = {
        rate: jax.tree.map(lambda *leaves: np.stack(leaves), *(run.history for run in done[: len(seeds)]))
        for rate, done in runs.items()
    }
    arms = {names[rate]: history for rate, history in stacked.items()}
    print(report.table(arms))
    results = report.as_json(arms, seeds=seeds, config=config, dropout_rates=flags.rates, flags=vars(flags))
    if flags.holdout:
        results["test"] = {}
        for rate, done in runs.items():
            measured = [evaluate(run.state.params, test, config=config) for run in done[: len(seeds)]]
            loss, accuracy = np.array(measured, np.float64).T
            results["test"][names[rate]] = {"loss": loss.tolist(), "accuracy": accuracy.tolist()}
            print(
                f"{names[rate]}, test set after the last epoch: loss {report.mean_and_sd(loss)}, "
                f"accuracy {report.mean_and_sd(accuracy)}"
            )

    last_rate = flags.rates[-1]
    params = runs[last_rate][0].state.params
    log_probs = FashionMLP(config.hidden).apply({"params": params}, jnp.array(test.images[:1]), deterministic=True)
    figures = {
        "losses": plot.losses(arms),
        "prediction": plot.classification(
            test.images[0], np.exp(log_probs[0]), class_names=CLASS_NAMES, label=int(test.labels[0])
        ),
        "samples": plot.image_sheet(train.images[:900]),
    }
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        files.write_atomically(flags.output / f"{name}.png", png.getvalue())
    files.write_atomically(flags.output / "history.json", json.dumps(results, indent=1, default=str) + "\n")
    print(f"pictures and history.json are in {flags.output}")
    return status


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fashion_jax").setLevel(logging.INFO)
    try:
        sys.exit(main(tyro.cli(Flags, description=__doc__)))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
