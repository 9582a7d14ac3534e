"""The best plain multilayer perceptron: no convolution, no other data. Recipes tried on a hold-out, tested once.

Each recipe is trained on 50,000 images, and the one with the highest accuracy on the other 10,000 is trained again on
all 60,000, with several seeds. Then the test set is touched, once.

Prints tables and writes report.md, report.json and each seed's network as network-SEED.safetensors.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from fashion_jax import TrainConfig, calibration, data, evidence, files, report, search, sweep
from fashion_jax.interop import save_safetensors
from fashion_jax.log import Progress
from fashion_jax.predict import predict
from fashion_jax.script import run_script
from fashion_jax.search import Setting

HOLD_OUT = 10_000
# The seed that chooses is not among those that are tested.
SEARCH_SEED = 1_000
BASE = {"hidden": (1024, 1024), "batch_size": 256, "learning_rate": 0.001, "train_eval_size": 2_000}
MOVED = {"flip": True, "shift": 1}
# Dropout rates that are tried, and with what.
TRIED: dict[str, tuple[tuple[float, ...], dict]] = {
    "mirrored, moved, decay 0.1": ((0.0, 0.1, 0.2, 0.3), {**MOVED, "weight_decay": 0.1}),
    "mirrored, moved, decay 0.3": ((0.0, 0.1), {**MOVED, "weight_decay": 0.3}),
    "mirrored, moved, decay 0.1, three layers": ((0.0, 0.1), {**MOVED, "weight_decay": 0.1, "hidden": (1024,) * 3}),
    "images as they are, 0.1 of the input dropped": ((0.2, 0.5), {"input_dropout": 0.1, "weight_decay": 0.0001}),
}
RECIPES = {f"dropout {rate:g}; {name}": (rate, fields) for name, (rates, fields) in TRIED.items() for rate in rates}
MEASURES = {"accuracy": "accuracy", "loss": "NLL", "brier": "Brier score", "calibration_error": "ECE"}


@dataclasses.dataclass(frozen=True)
class Flags:
    epochs: int = 40
    """Passes over the training set: of each recipe over 50,000 images, of the chosen one over all 60,000."""
    seeds: int = 8
    """Number of seeds that are tested, from 0."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Recipes to choose from."""
    train_size: int | None = None
    """Training images to use in all, hold-out included; 60,000 if left out."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to save to after each epoch. The same command, given again, goes on from there after a run was stopped
    or killed."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set; see `python -m fashion_jax.data --help`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/best_perceptron")
    """Directory to write into."""


def setting(recipe: str, epochs: int, examples: int) -> Setting:
    rate, fields = RECIPES[recipe]
    config = TrainConfig(**{**BASE, **fields})
    steps = config.steps_per_epoch(examples)
    return Setting(dataclasses.replace(config, warmup_steps=steps, decay_steps=epochs * steps), rate, epochs)


def main(flags: Flags) -> int:
    if flags.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {flags.seeds}")
    if not flags.recipes or not set(flags.recipes) <= set(RECIPES):
        raise ValueError(f"--recipes must be some of {'; '.join(map(repr, RECIPES))}; got {flags.recipes}")
    if flags.epochs < 2:
        raise ValueError(
            f"--epochs must be at least 2, because the learning rate rises in the first; got {flags.epochs}"
        )
    sweep.use_all_cores()
    train, test = data.load(flags.data_dir)
    if flags.train_size is not None:
        train = data.subset(train, flags.train_size, key=jax.random.key(0))
    part, held_out = data.hold_out(train, 1 / 6, key=jax.random.key(0))
    files.prepare_directory(flags.output)

    start = time.monotonic()
    settings = {name: setting(name, flags.epochs, len(part.labels)) for name in flags.recipes}
    with Progress(flags.epochs * len(search.programs(settings))) as progress:
        runs = search.train_settings(
            part,
            held_out,
            settings=settings,
            seeds=[SEARCH_SEED],
            on_epoch=progress,
            checkpoint=flags.checkpoint,
        )
    tried = {name: run.history.validation for name, run in runs.items()}
    # A recipe that stopped has NaN, and is not it.
    chosen = max(tried, key=lambda name: np.nan_to_num(tried[name].accuracy[0, -1], nan=-1))
    searched = time.monotonic() - start

    final = setting(chosen, flags.epochs, len(train.labels))
    seeds = list(range(flags.seeds))
    with Progress(flags.epochs) as progress:
        # The held-out images are among those trained on now, and their curves say nothing.
        run = search.train_settings(
            train,
            held_out,
            settings={chosen: final},
            seeds=seeds,
            on_epoch=progress,
            checkpoint=flags.checkpoint,
        )[chosen]
    if np.isnan(run.history.running_loss).any():
        raise FloatingPointError(f"{chosen}: the chosen recipe stopped with a seed, as was warned of")
    trained = time.monotonic() - start - searched

    of_seeds = []
    for seed in seeds:
        params = jax.tree.map(lambda leaf, at=seed: leaf[at], run.state.params)
        of_seeds.append(calibration.score(predict(params, test.images, config=final.config), test.labels))
        path = flags.output / f"network-{seed}.safetensors"
        save_safetensors(path, params, config=final.config, dropout_rate=final.dropout_rate)
    scores = jax.tree.map(lambda *leaves: np.stack(leaves), *of_seeds)
    rows: list[tuple[str, ...]] = [("recipe", "hold-out accuracy", "hold-out NLL")]
    rows += [(name, f"{of.accuracy[0, -1]:.4f}", f"{of.loss[0, -1]:.4f}") for name, of in tried.items()]
    sections = [f"Tried, {flags.epochs} epochs, one seed:", report.markdown(rows)]
    rows = [("measure", "mean and 95% interval", "lowest", "highest")]
    for field, label in MEASURES.items():
        values = getattr(scores, field)
        mean = str(evidence.interval(values)).replace("+", "")
        rows.append((label, mean, f"{values.min():.4f}", f"{values.max():.4f}"))
    sections += [
        f"{chosen}, {flags.epochs} epochs, {report.number_of_seeds(len(seeds))}: the test set (NLL in nats).",
        report.markdown(rows),
        f"In this process the search took {searched:.0f} s, and the training after it {trained:.0f} s.",
    ]
    print("\n\n".join(sections))
    results = {
        "environment": report.environment(),
        "flags": report.recorded_flags(flags),
        "tried": {
            name: {"accuracy": of.accuracy[0].tolist(), "loss": of.loss[0].tolist()} for name, of in tried.items()
        },
        "chosen": chosen,
        "config": final.config.as_dict(),
        "dropout_rate": final.dropout_rate,
        "seeds": seeds,
        "test": {field: getattr(scores, field).tolist() for field in MEASURES},
        "seconds": {"search": searched, "training": trained},
    }
    files.write_atomically(flags.output / "report.json", json.dumps(results, indent=1, default=str) + "\n")
    files.write_atomically(flags.output / "report.md", "\n\n".join(sections) + "\n")
    print(f"report.md, report.json and the networks are in {flags.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main, lambda: tyro.cli(Flags, description=__doc__))
