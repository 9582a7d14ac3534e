"""Classify pictures of clothes, PNG, JPEG or WebP files, with a network that is trained and kept at the first call."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from fashion_jax import Progress, fit, load, predict, predict_mc, read_image, report
from fashion_jax.calibration import entropy
from fashion_jax.interop import load_safetensors, save_safetensors
from fashion_jax.plot import classification, save
from fashion_jax.script import exit_if_interrupted, logger, run_script

LIGHT_ON_DARK = {"auto": None, "light": True, "dark": False}


@dataclasses.dataclass(frozen=True)
class Flags:
    images: tyro.conf.Positional[tuple[Path, ...]]  # Pictures of one piece of clothing each, on a plain background.
    model: Path = Path("runs/classify/network.safetensors")  # The network; if there is no such file, it is trained.
    samples: int = 0  # Thinned networks of Monte Carlo dropout, for error bars of ± one std; 0 switches dropout off.
    objects: Literal["auto", "light", "dark"] = "auto"  # How clothes differ from their background.
    rate: float = 0.2  # Dropout rate of the training, in [0, 1).
    epochs: int = 30  # Passes over the training set.
    seed: int = 0  # Seed of the training and of Monte Carlo dropout.
    checkpoint: Path | None = None  # Directory to save every epoch to; the same command resumes from there.
    data_dir: Path | None = None  # Directory with the data set.
    output: Path = Path("runs/classify")  # Directory to write pictures to.


def main(flags: Flags) -> int:
    images, status = [], 0
    for path in flags.images:
        try:
            images.append((path, read_image(path, light_on_dark=LIGHT_ON_DARK[flags.objects])))
        except (ValueError, OSError) as error:
            logger.error("error: %s", error)
            status = 1
    if not images:
        raise ValueError("there is no picture to classify")
    if not flags.model.exists():
        train(flags)
    network, key = load_safetensors(flags.model), jax.random.key(flags.seed)
    pixels = np.stack([image for _, image in images])
    logger.info("using the network in %s", flags.model)
    rows = [["file", "class", "probability", "next", "probability", "entropy (nats)", "less certain than"]]
    probabilities = predict(network.params, pixels, config=network.config)
    # What is no piece of clothing gets a class too, often with less certainty than the data set's own images.
    usual = entropy(predict(network.params, load(data_dir=flags.data_dir).test.images, config=network.config))
    ranks = (usual < entropy(probabilities)[:, None]).mean(axis=1)
    spread = information = None
    if flags.samples:
        sampled = predict_mc(network.params, pixels, key=key, samples=flags.samples, config=network.config)
        probabilities, spread, information = sampled.probabilities, sampled.std, sampled.mutual_information
        rows[0].append("mutual information (nats)")
    for i, ((path, image), nats) in enumerate(zip(images, entropy(probabilities), strict=True)):
        row = [str(path)]
        for j in probabilities[i].argsort()[:-3:-1]:
            around = "" if spread is None else f" ± {spread[i, j]:.3f}"
            row += [network.class_names[j], f"{probabilities[i, j]:.3f}{around}"]
        row += [f"{nats:.3f}", f"{ranks[i]:.0%} of test images"]
        rows.append([*row, *([] if information is None else [f"{information[i]:.3f}"])])
        error_bars = None if spread is None else spread[i]
        figure = classification(image, probabilities[i], class_names=network.class_names, spread=error_bars)
        # Numbered, because files in several directories may share a name.
        save(figure, flags.output / f"{i + 1:02}-{path.stem[:50]}.png")
    print(report.markdown(rows))
    logger.info("pictures are in %s", flags.output)
    return status


def train(flags: Flags) -> None:
    train, test = load(data_dir=flags.data_dir)
    options = {"epochs": flags.epochs, "checkpoint": flags.checkpoint, "callbacks": [Progress()]}
    run = fit(train, test, key=jax.random.key(flags.seed), dropout_rate=flags.rate, **options)
    exit_if_interrupted(run.history, flags.epochs)
    save_safetensors(flags.model, run.state.params, dropout_rate=flags.rate)


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
