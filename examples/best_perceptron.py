"""Search for the best multilayer perceptron: try recipes on a hold-out, train the best on all images, test it once."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from fashion_jax import Batch, FashionMLP, Progress, TrainConfig, predict, sweep, use_all_cores
from fashion_jax.augment import shift_and_flip
from fashion_jax.calibration import score
from fashion_jax.data import hold_out, load, subset
from fashion_jax.interop import save_safetensors
from fashion_jax.script import TrainingFlags, exit_if_interrupted, flag, logger, publish, run_script
from fashion_jax.statistics import interval

MOVED, SEARCH_SEED = functools.partial(shift_and_flip, pixels=1), 1_000
# A structure, layers and augmentation, is a compiled program; the numbers tried with it are the axes of one sweep.
STRUCTURES = {
    "augmented": ((1024, 1024), MOVED, {"dropout_rate": (0.0, 0.1, 0.2, 0.3), "weight_decay": (0.1, 0.3)}),
    "deeper": ((1024, 1024, 1024), MOVED, {"dropout_rate": (0.0, 0.1), "weight_decay": (0.1, 0.3)}),
    "plain": ((1024, 1024), None, {"dropout_rate": (0.2, 0.5), "weight_decay": (0.0001, 0.1)}),
}


@dataclasses.dataclass(frozen=True)
class Flags(TrainingFlags):
    structures: tuple[Literal["augmented", "deeper", "plain"], ...] = ("augmented",)  # Structures to try.
    epochs: int = 40  # Passes over the training set, in the search and after it.
    seeds: int = 8  # Number of seeds to test, from 0; each network is written to network-SEED.safetensors.
    train_size: int = 60_000  # Number of training images to use; a sixth of them is held out for the search.
    output: Path = Path("runs/best_perceptron")  # Directory to write to.


def train(flags: Flags, title: str, structure: str, images: Batch, validation: Batch, **axes: Any):
    hidden, augment, _ = STRUCTURES[structure]
    steps = -(-len(images.labels) // 256)
    schedule = optax.warmup_cosine_decay_schedule(0, 1, warmup_steps=steps, decay_steps=max(flags.epochs, 2) * steps)

    def adamw(learning_rate, weight_decay=0.0):
        return optax.adamw(lambda step: learning_rate * schedule(step), weight_decay=weight_decay)

    logger.info("%s: %d images", title, len(images.labels))
    config = TrainConfig(FashionMLP(hidden), adamw, augment=augment, batch_size=256, train_eval_size=2_000)
    how = {"config": config, "epochs": flags.epochs, "callbacks": [Progress()], "learning_rate": 0.001}
    result = sweep(images, validation, checkpoint=flags.checkpoint and flags.checkpoint / title, **how, **axes)
    exit_if_interrupted(result.history, flags.epochs)
    return config, result


def main(flags: Flags) -> None:
    use_all_cores()
    images, test = load(data_dir=flags.data_dir)
    with flag("--train-size"):
        images = subset(images, flags.train_size, key=jax.random.key(0))
        part, held_out = hold_out(images, 1 / 6, key=jax.random.key(0))
    tried, rows = {}, [["structure", "dropout rate", "weight decay", "hold-out accuracy", "hold-out NLL"]]
    for structure in flags.structures:
        *_, grid = STRUCTURES[structure]
        _, result = train(flags, structure, structure, part, held_out, seeds=[SEARCH_SEED], **grid)
        for rate, decay in itertools.product(*grid.values()):
            run = result.at(dropout_rate=rate, weight_decay=decay, seed=SEARCH_SEED)
            loss, accuracy = (curve[-1] for curve in run.history.validation)
            tried[structure, rate, decay] = np.nan_to_num(accuracy)  # NaN where a run diverged.
            rows.append([structure, f"{rate:g}", f"{decay:g}", f"{accuracy:.4f}", f"{loss:.4f}"])
    structure, rate, decay = chosen = max(tried, key=lambda recipe: tried[recipe])
    # The held-out images are among those trained on now; the test set has to decide.
    numbers = {"seeds": range(flags.seeds), "dropout_rate": rate, "weight_decay": decay}
    config, result = train(flags, "final", structure, images, held_out, **numbers)
    scores = score(predict(result.state.params, test.images, config=config), test.labels)
    for seed in range(flags.seeds):
        params, path = result.at(seed=seed).state.params, flags.output / f"network-{seed}.safetensors"
        save_safetensors(path, params, config=config, dropout_rate=rate)
    measures = {"accuracy": scores.accuracy, "NLL": scores.loss, "Brier": scores.brier, "ECE": scores.calibration_error}
    tests = [["measure", "mean and 95% interval", "lowest", "highest"]]
    for name, values in measures.items():
        tests.append([name, str(interval(values)).replace("+", ""), f"{values.min():.4f}", f"{values.max():.4f}"])
    about = f"Test set: {structure}, dropout rate {rate:g}, weight decay {decay:g}, {flags.seeds} seeds; NLL in nats."
    tables = {f"Tried, {flags.epochs} epochs, one seed:": rows, about: tests}
    publish(flags, tables, {}, report={"tried": rows, "chosen": chosen, "config": config, "test": measures})


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
