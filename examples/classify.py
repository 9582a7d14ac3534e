"""Classify pictures of clothes (PNG, JPEG or WebP) with a network that is trained and saved on the first call."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from fashion_jax import FashionMLP, Progress, TrainConfig, fit, predict, predict_mc, report
from fashion_jax.calibration import entropy
from fashion_jax.data import CLASS_NAMES, hold_out, load
from fashion_jax.images import read_folder, read_image
from fashion_jax.interop import load_safetensors, save_safetensors
from fashion_jax.plot import classification, save
from fashion_jax.script import exit_if_interrupted, logger, run_script

LIGHT_ON_DARK = {"auto": None, "light": True, "dark": False}


@dataclasses.dataclass(frozen=True)
class Flags:
    images: tyro.conf.Positional[tuple[Path, ...]]  # Pictures of one piece of clothing each, on a plain background.
    train_dir: Path | None = None  # Train a new network on this directory, which has one folder of pictures per class.
    model: Path = Path("runs/classify/network.safetensors")  # The network; if there is no such file, it is trained.
    samples: int = 0  # Thinned networks of Monte Carlo dropout, for error bars of ± one std; 0 switches dropout off.
    objects: Literal["auto", "light", "dark"] = "auto"  # How clothes differ from their background.
    rate: float = 0.2  # Dropout rate for training, in [0, 1).
    epochs: int = 30  # Passes over the training set.
    seed: int = 0  # Seed for training and Monte Carlo dropout.
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
    if flags.train_dir or not flags.model.exists():
        train(flags)
    network, key = load_safetensors(flags.model), jax.random.key(flags.seed)
    pixels = np.stack([image for _, image in images])
    logger.info("using the network in %s", flags.model)
    probabilities = predict(network.params, pixels, config=network.config)
    spread, extra = None, {}
    if network.class_names == CLASS_NAMES:
        # What is no piece of clothing gets a class too, often with less certainty than the data set's own images.
        usual = entropy(predict(network.params, load(data_dir=flags.data_dir).test.images, config=network.config))
        extra["less certain than"] = [f"{(usual < nats).mean():.0%} of test images" for nats in entropy(probabilities)]
    if flags.samples:
        sampled = predict_mc(network.params, pixels, key=key, samples=flags.samples, config=network.config)
        probabilities, spread = sampled.probabilities, sampled.std
        extra["mutual information (nats)"] = [f"{nats:.3f}" for nats in sampled.mutual_information]
    rows = [["file", "class", "probability", "next", "probability", "entropy (nats)", *extra]]
    for i, ((path, image), nats) in enumerate(zip(images, entropy(probabilities), strict=True)):
        row = [str(path)]
        for j in probabilities[i].argsort()[:-3:-1]:
            around = "" if spread is None else f" ± {spread[i, j]:.3f}"
            row += [network.class_names[j], f"{probabilities[i, j]:.3f}{around}"]
        rows.append([*row, f"{nats:.3f}", *(column[i] for column in extra.values())])
        error_bars = None if spread is None else spread[i]
        figure = classification(image, probabilities[i], class_names=network.class_names, spread=error_bars)
        # Numbered, because files in several directories may share a name.
        save(figure, flags.output / f"{i + 1:02}-{path.stem[:50]}.png")
    print(report.markdown(rows))
    logger.info("pictures are in %s", flags.output)
    return status


def train(flags: Flags) -> None:
    light, key = LIGHT_ON_DARK[flags.objects], jax.random.key(flags.seed)
    folder, names = read_folder(flags.train_dir, light_on_dark=light) if flags.train_dir else (None, CLASS_NAMES)
    data = hold_out(folder, 0.2, key=key) if folder else load(data_dir=flags.data_dir)
    config = TrainConfig(model=FashionMLP(classes=len(names)))
    options = {"epochs": flags.epochs, "checkpoint": flags.checkpoint, "callbacks": [Progress()]}
    run = fit(*data, key=key, config=config, dropout_rate=flags.rate, **options)
    exit_if_interrupted(run.history, flags.epochs)
    save_safetensors(flags.model, run.state.params, config=config, class_names=names, dropout_rate=flags.rate)


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
