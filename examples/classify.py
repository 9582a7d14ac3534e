"""Classify image files with a trained network; train and keep one if there is none yet.

Takes PNG, JPEG and WebP files that show one piece of clothing on a plain background. Prints a table, and draws for each
file what the network sees beside the ten probabilities.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from fashion_jax import CLASS_NAMES, TrainConfig, calibration, data, files, fit, plot, report
from fashion_jax.interop import Network, load_safetensors, save_safetensors
from fashion_jax.log import Progress
from fashion_jax.model import check_rate
from fashion_jax.predict import predict, predict_mc, read_image
from fashion_jax.script import run_script

RATE = 0.2
LIGHT_ON_DARK = {"auto": None, "light": True, "dark": False}


@dataclasses.dataclass(frozen=True)
class Flags:
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Files to classify."""
    model: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("runs/classify/network.safetensors")
    """The network. If there is no such file, a network is trained and saved there."""
    samples: int = 0
    """Thinned networks of Monte Carlo dropout, for error bars of +- one standard deviation; 0 for dropout off."""
    objects: Literal["auto", "light", "dark"] = "auto"
    """Whether the clothes are lighter or darker than their background; by default each picture's border decides."""
    rate: float | None = None
    """Dropout rate in [0, 1), of the training and of Monte Carlo dropout. If left out, that of the network in FILE, or
    0.2 for a new one."""
    epochs: int = 30
    """Passes over the training set, if a network has to be trained."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to save to after each epoch of the training. The same command, given again, goes on from there."""
    seed: int = 0
    """Seed of the training and of Monte Carlo dropout."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set; see `python -m fashion_jax.data --help`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/classify")
    """Directory to write the pictures into."""


def main(flags: Flags) -> int:
    if flags.samples < 0:
        raise ValueError(f"--samples must be at least 0, got {flags.samples}")
    if not 0 <= flags.seed < 2**32:
        raise ValueError(f"--seed must lie between 0 and 2**32 - 1, got {flags.seed}")
    if flags.rate is not None:
        check_rate(flags.rate, "--rate")
    images: dict[Path, np.ndarray] = {}
    unread = 0
    for path in flags.images:
        try:
            images[path] = read_image(path, light_on_dark=LIGHT_ON_DARK[flags.objects])
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            unread += 1
    if not images:
        print("error: there is no image to classify", file=sys.stderr)
        return 1

    if flags.model.exists():
        network = load_safetensors(flags.model)
        if network.class_names != CLASS_NAMES:
            raise ValueError(
                f"{flags.model} tells other classes than Fashion-MNIST's: {', '.join(network.class_names)}"
            )
        if None not in (flags.rate, network.dropout_rate) and flags.rate != network.dropout_rate:
            raise ValueError(
                f"{flags.model} was trained with the dropout rate {network.dropout_rate}, and --rate is {flags.rate}; "
                "leave --rate out, or name a new file with --model"
            )
        print(f"using the network in {flags.model}", file=sys.stderr)
    else:
        network = train(flags)
        if network is None:
            return 130

    pixels = np.stack(list(images.values()))
    spread, mutual_information = None, None
    if flags.samples:
        rate = flags.rate if network.dropout_rate is None else network.dropout_rate
        if rate is None:
            raise ValueError(f"{flags.model} does not tell which dropout rate it was trained with; name it with --rate")
        sampled = predict_mc(
            network.params,
            pixels,
            key=jax.random.key(flags.seed),
            samples=flags.samples,
            dropout_rate=rate,
            config=network.config,
        )
        probabilities, spread, mutual_information = sampled.probabilities, sampled.spread, sampled.mutual_information
    else:
        probabilities = predict(network.params, pixels, config=network.config)
    entropy = calibration.entropy(probabilities)

    rows: list[tuple[str, ...]] = [("file", "class", "probability", "next", "probability", "entropy (nats)")]
    if mutual_information is not None:
        rows = [(*rows[0], "mutual information (nats)")]
    files.prepare_directory(flags.output)
    for i, (path, image) in enumerate(images.items()):
        best, second = probabilities[i].argsort()[::-1][:2]
        row = [str(path)]
        for j in (best, second):
            around = "" if spread is None else f" ± {spread[i, j]:.3f}"
            row += [CLASS_NAMES[j], f"{probabilities[i, j]:.3f}{around}"]
        row.append(f"{entropy[i]:.3f}")
        if mutual_information is not None:
            row.append(f"{mutual_information[i]:.3f}")
        rows.append(tuple(row))
        around = None if spread is None else spread[i]
        figure = plot.classification(image, probabilities[i], class_names=CLASS_NAMES, spread=around)
        # Numbered, because files of several directories may share a name; a name has at most 255 bytes, a letter 4.
        plot.save(figure, flags.output / f"{i + 1:02}-{path.stem[:50]}.png", dpi=150)
    print(report.markdown(rows))
    print(f"pictures are in {flags.output}", file=sys.stderr)
    return 1 if unread else 0


def train(flags: Flags) -> Network | None:
    """Train a network and keep it; give None if Ctrl-C stopped it early."""
    config, rate = TrainConfig(), RATE if flags.rate is None else flags.rate
    for directory in (flags.output, flags.model.parent):
        files.prepare_directory(directory)
    splits = data.load(flags.data_dir)
    with Progress(flags.epochs) as progress:
        run = fit(
            splits.train,
            splits.test,
            key=jax.random.key(flags.seed),
            config=config,
            dropout_rate=rate,
            epochs=flags.epochs,
            on_epoch=progress,
            checkpoint=flags.checkpoint,
        )
    if len(run.history.running_loss) < flags.epochs:
        print("stopped before training ended; the network was not kept", file=sys.stderr)
        return None
    save_safetensors(flags.model, run.state.params, config=config, dropout_rate=rate)
    accuracy = run.history.validation.accuracy[-1]
    print(f"trained, accuracy on the test set {accuracy:.4f}; the network is in {flags.model}", file=sys.stderr)
    return Network(run.state.params, config, CLASS_NAMES, rate)


if __name__ == "__main__":
    run_script(main, lambda: tyro.cli(Flags, description=__doc__))
