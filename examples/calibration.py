"""Does dropout know what it does not know? No dropout, dropout with weights scaled, and Monte Carlo dropout."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from fashion_jax import Progress, load, predict, predict_mc, subset, sweep, use_all_cores
from fashion_jax.calibration import detection, entropy, reliability, score
from fashion_jax.script import TrainingFlags, exit_if_interrupted, flag, publish, run_script
from fashion_jax.statistics import interval, paired

NONE, SCALED, MC = ARMS = ("no dropout", "dropout, weights scaled", "Monte Carlo dropout")
MEASURES = {"accuracy": "accuracy", "loss": "NLL", "brier": "Brier score", "calibration_error": "ECE"}


@dataclasses.dataclass(frozen=True)
class Flags(TrainingFlags):
    epochs: int = 30  # Passes over the training set.
    seeds: int = 8  # Number of seeds, from 0; each trains without and with dropout.
    rate: float = 0.2  # Dropout rate in (0, 1), for training and for Monte Carlo dropout.
    samples: int = 100  # Number of thinned networks for Monte Carlo dropout.
    train_size: int = 60_000  # Number of training images to use, stratified by class.
    output: Path = Path("runs/calibration")  # Directory to write to.


def main(flags: Flags) -> None:
    if not flags.rate:
        raise ValueError(f"--rate must be above 0, got {flags.rate}; the other arm trains without dropout")
    use_all_cores()
    train, test = load(data_dir=flags.data_dir)
    with flag("--train-size"):
        train = subset(train, flags.train_size, key=jax.random.key(0))
    how: Any = {"epochs": flags.epochs, "callbacks": [Progress()], "checkpoint": flags.checkpoint}
    result = sweep(train, test, seeds=range(flags.seeds), dropout_rate=(0.0, flags.rate), **how)
    exit_if_interrupted(result.history, flags.epochs)
    plain, dropped = (result.at(dropout_rate=rate).state.params for rate in (0.0, flags.rate))
    noise = np.random.default_rng(0).integers(0, 256, test.images.shape, np.uint8)
    turned, inverted = np.rot90(test.images, axes=(1, 2)), 255 - test.images
    probabilities, nats = {}, {}  # Leaves have the seeds in front.
    parts = {"test set": test.images, "noise": noise, "rotated by 90°": turned, "inverted": inverted}
    for part, images in parts.items():
        mc = predict_mc(dropped, images, key=jax.random.key(1), samples=flags.samples, dropout_rate=flags.rate)
        probabilities[part] = {NONE: predict(plain, images), SCALED: predict(dropped, images), MC: mc.probabilities}
        nats[part] = {arm: entropy(p) for arm, p in probabilities[part].items()}
        nats[part]["mutual information"] = mc.mutual_information

    scores = {arm: score(p, test.labels) for arm, p in probabilities["test set"].items()}
    values = {arm: [getattr(scores[arm], name) for name in MEASURES] for arm in ARMS}
    measures = [["arm", *MEASURES.values()], *([arm, *map(cell, values[arm])] for arm in ARMS)]
    differences = [["arms", *MEASURES.values()]]
    for one, other in ((SCALED, NONE), (MC, SCALED), (MC, NONE)):
        differences.append([f"{one} minus {other}", *map(str, map(paired, values[one], values[other]))])
    means, areas = [["images", *nats["noise"]]], [["images", *nats["noise"]]]
    for part, named in nats.items():
        means.append([part, *(cell(values.mean(axis=-1)) for values in named.values())])
        areas.append([part, *(cell(detection(nats["test set"][name], values)) for name, values in named.items())])
    tables = {
        f"Test set (mean and 95% interval over {flags.seeds} seeds; NLL in nats):": measures,
        "Differences paired by seed:": differences,
        "Mean entropy of the predictions, and mutual information of Monte Carlo dropout, in nats:": means,
        "How well that number tells images from the test set (area under the ROC curve):": areas,
    }
    figures = {name: Figure(figsize=(13, 4), layout="constrained") for name in ("reliability", "entropy")}
    for i, (arm, p) in enumerate(probabilities["test set"].items(), start=1):
        axes = figures["reliability"].add_subplot(1, 3, i, title=arm, xlabel="confidence")
        curve = reliability(p, test.labels)
        axes.stairs(curve.share.mean(axis=0), np.linspace(0, 1, 16), fill=True, alpha=0.3, label="share of images")
        axes.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
        x, y, error = curve.confidence.mean(axis=0), curve.accuracy.mean(axis=0), curve.accuracy.std(axis=0)
        axes.errorbar(x, y, error, marker="o", capsize=3, label="accuracy, mean ± std over seeds")
    for i, (part, named) in enumerate(nats.items(), start=1):
        axes = figures["entropy"].add_subplot(1, 4, i, title=part, xlabel="entropy (nats)", xlim=(0, np.log(10)))
        for arm, style in zip(ARMS, (":", "--", "-"), strict=True):
            axes.ecdf(named[arm].ravel(), label=arm, linestyle=style)
    figures["reliability"].axes[0].legend(fontsize="small")
    figures["entropy"].axes[0].set_ylabel("share of images with at most this entropy")
    figures["entropy"].axes[0].legend(fontsize="small")
    publish(flags, tables, figures, report={"arms": scores, "mean": means, "detection": areas})


def cell(values: np.ndarray) -> str:
    return str(interval(values)).replace("+", "")


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
