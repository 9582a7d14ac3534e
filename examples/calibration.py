"""Does dropout know what it does not know? No dropout, dropout with weights scaled, and Monte Carlo dropout.

Trains both arms with several seeds, and tells how good their probabilities are on the test set, and how unsure they are
of images that are no clothes, or lie on their side, or are negatives. Prints tables and writes reliability.png,
entropy.png, confusion.png, report.md and report.json.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from fashion_jax import CLASS_NAMES, TrainConfig, calibration, data, evidence, files, plot, report, sweep
from fashion_jax.log import Progress
from fashion_jax.predict import predict, predict_mc
from fashion_jax.script import INTERRUPTED, run_script

ARMS = ("no dropout", "dropout, weights scaled", "Monte Carlo dropout")
QUANTITIES = {"accuracy": "accuracy", "loss": "NLL", "brier": "Brier score", "calibration_error": "ECE"}


@dataclasses.dataclass(frozen=True)
class Flags:
    epochs: int = 30
    """Passes over the training set."""
    seeds: int = 8
    """Number of seeds; the runs use 0, 1, 2, ..., each once with and once without dropout."""
    rate: float = 0.2
    """Dropout rate in (0, 1), of the training and of Monte Carlo dropout."""
    samples: int = 100
    """Thinned networks of Monte Carlo dropout."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to save to after each epoch. The same command, given again, goes on from there after a run was stopped
    or killed."""
    train_size: int | None = None
    """Training images to use, the same share of each class; all if left out."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set; see `python -m fashion_jax.data --help`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/calibration")
    """Directory to write into."""


def main(flags: Flags) -> int:
    if flags.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {flags.seeds}")
    if flags.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {flags.samples}")
    if flags.rate == 0:
        raise ValueError("--rate must be above 0: without dropout there is nothing to compare with")
    sweep.use_all_cores()
    config = TrainConfig()
    train, test = data.load(flags.data_dir)
    if flags.train_size is not None:
        train = data.subset(train, flags.train_size, key=jax.random.key(0))
    files.prepare_directory(flags.output)
    seeds = list(range(flags.seeds))
    with Progress(flags.epochs) as progress:
        run = sweep.sweep(
            train,
            test,
            seeds=seeds,
            dropout_rates=(0.0, flags.rate),
            config=config,
            epochs=flags.epochs,
            on_epoch=progress,
            checkpoint=flags.checkpoint,
        )
    complete = run.history.running_loss.shape[-1]
    if complete < flags.epochs:
        print(f"stopped after epoch {complete} of {flags.epochs}; run the command again for all", file=sys.stderr)
    if not np.isfinite(run.history.running_loss).all():
        raise FloatingPointError("a network's loss was not finite, so the seeds cannot be compared")

    parts = {
        "test set": test.images,
        "noise": np.random.default_rng(0).integers(0, 256, test.images.shape, np.uint8),
        "rotated by 90°": np.rot90(test.images, axes=(1, 2)),
        "inverted": 255 - test.images,
    }
    scores: dict[str, list] = {arm: [] for arm in ARMS}
    curves: dict[str, list] = {arm: [] for arm in ARMS}
    measures: dict[str, dict[str, list]] = {part: {} for part in parts}
    for seed in seeds:
        plain, dropped = (
            jax.tree.map(lambda leaf, at=(arm, seed): leaf[at], run.state.params)  # Seeds count from 0.
            for arm in (0, 1)
        )
        key = jax.random.fold_in(jax.random.key(1), seed)
        for part, images in parts.items():
            sampled = predict_mc(
                dropped, images, key=key, samples=flags.samples, dropout_rate=flags.rate, config=config
            )
            said = (predict(plain, images, config=config), predict(dropped, images, config=config))
            for arm, probabilities in zip(ARMS, (*said, sampled.probabilities), strict=True):
                measures[part].setdefault(arm, []).append(calibration.entropy(probabilities))
                if part == "test set":
                    scores[arm].append(calibration.score(probabilities, test.labels))
                    curves[arm].append(calibration.reliability(probabilities, test.labels))
            measures[part].setdefault("mutual information", []).append(sampled.mutual_information)

    stacked = {arm: jax.tree.map(lambda *leaves: np.stack(leaves), *of_seeds) for arm, of_seeds in scores.items()}
    measured = {part: {name: np.stack(of) for name, of in named.items()} for part, named in measures.items()}
    intervals = {
        arm: {name: evidence.interval(getattr(of_seeds, name)) for name in QUANTITIES}
        for arm, of_seeds in stacked.items()
    }
    pairs = ((ARMS[1], ARMS[0]), (ARMS[2], ARMS[1]), (ARMS[2], ARMS[0]))
    differences = {
        f"{first} minus {second}": {
            name: evidence.paired(getattr(stacked[first], name), getattr(stacked[second], name)) for name in QUANTITIES
        }
        for first, second in pairs
    }
    unsure = {
        part: {name: evidence.interval(values.mean(axis=1)) for name, values in named.items()}
        for part, named in measured.items()
    }
    detected = {
        part: {
            name: evidence.interval(np.array([*map(calibration.detection, measured["test set"][name], values)]))
            for name, values in named.items()
        }
        for part, named in measured.items()
        if part != "test set"
    }

    def lay_out(heading: str, columns: list[str], rows: dict[str, dict[str, evidence.Interval]], sign: str = "") -> str:
        # The plus that an Interval writes is for differences alone; a bound below 0 keeps its minus.
        cells = [(name, *(str(cell).replace("+", sign) for cell in row.values())) for name, row in rows.items()]
        return report.markdown([(heading, *columns), *cells])

    named = (*ARMS, "mutual information")
    classes: list[tuple[str, ...]] = [
        ("class", *(f"{what}: {arm}" for what in ("precision", "recall") for arm in ARMS))
    ]
    for i, name in enumerate(CLASS_NAMES):
        cells = [
            report.mean_and_sd(getattr(stacked[arm], what)[:, i]) for what in ("precision", "recall") for arm in ARMS
        ]
        classes.append((name, *cells))
    sections = [
        f"The test set (mean and 95% interval over {report.number_of_seeds(len(seeds))}; NLL in nats).",
        lay_out("arm", list(QUANTITIES.values()), intervals),
        "Differences paired by seed:",
        lay_out("arms", list(QUANTITIES.values()), differences, sign="+"),
        "Mean entropy of the predictions, and mean mutual information of Monte Carlo dropout, in nats:",
        lay_out("images", list(named), unsure),
        "How well that number tells these images from the test set (area under the ROC curve):",
        lay_out("images", list(named), detected),
        "Each class of the test set (mean ± standard deviation over seeds):",
        report.markdown(classes),
    ]
    print("\n\n".join(sections))

    figures = {
        "reliability": plot.reliability(
            {arm: jax.tree.map(lambda *leaves: np.stack(leaves), *of_seeds) for arm, of_seeds in curves.items()}
        ),
        "entropy": plot.entropies({part: {arm: named[arm] for arm in ARMS} for part, named in measured.items()}),
        "confusion": plot.confusion(
            {arm: of_seeds.confusion.sum(axis=0) for arm, of_seeds in stacked.items()}, class_names=CLASS_NAMES
        ),
    }
    for name, figure in figures.items():
        plot.save(figure, flags.output / f"{name}.png")
    results = {
        "environment": report.environment(),
        "config": config.as_dict(),
        "flags": report.recorded_flags(flags),
        "epochs": complete,
        "seeds": seeds,
        "arms": {
            arm: {name: leaf.tolist() for name, leaf in of_seeds._asdict().items()} for arm, of_seeds in stacked.items()
        },
        "mean entropy and mutual information": {
            part: {name: values.mean(axis=1).tolist() for name, values in named.items()}
            for part, named in measured.items()
        },
    }
    files.write_atomically(flags.output / "report.json", json.dumps(results, indent=1, default=str) + "\n")
    files.write_atomically(flags.output / "report.md", "\n\n".join(sections) + "\n")
    print(f"pictures and report are in {flags.output}", file=sys.stderr)
    return 0 if complete == flags.epochs else INTERRUPTED


if __name__ == "__main__":
    run_script(main, lambda: tyro.cli(Flags, description=__doc__))
