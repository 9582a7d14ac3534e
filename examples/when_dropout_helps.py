"""When does dropout help? Dropout against its rivals, each with as many tried settings, chosen on a hold-out.

Nothing, early stopping, fewer epochs, weight decay, dropout, wider layers without and with dropout, dropout beside
weight decay; at several training-set sizes, and with augmented images. Each tries three settings. The one with the
highest accuracy on 10,000 held-out images is trained again with other seeds, and tested once.

Early stopping takes each run's parameters of the epoch with the lowest hold-out loss. Fewer epochs are as many as had
the highest hold-out accuracy.

Prints tables and writes rivals.png, report.md and report.json.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from fashion_jax import TrainConfig, calibration, data, evidence, files, plot, report, search, sweep
from fashion_jax.log import Progress
from fashion_jax.predict import predict
from fashion_jax.script import run_script
from fashion_jax.search import Setting
from fashion_jax.train import Run

HOLD_OUT, TRAINING = 10_000, 50_000
# Seeds that choose are not among those that are tested.
SEARCH_SEEDS = (1_000, 1_001)
MEASURES = {"accuracy": "accuracy", "loss": "NLL", "calibration_error": "ECE"}
RIVALS = ("nothing", "weight decay", "dropout", "wider", "wider, dropout", "dropout, weight decay")
CLAIMS = (
    ("dropout", "nothing"),
    ("dropout", "early stopping"),
    ("dropout", "fewer epochs"),
    ("dropout", "weight decay"),
    ("wider, dropout", "wider"),
    ("dropout, weight decay", "weight decay"),
)


@dataclasses.dataclass(frozen=True)
class Flags:
    sizes: tuple[int, ...] = (1_000, 10_000, 50_000)
    """Numbers of training images, at most 50,000."""
    epochs: tuple[int, ...] = (100, 40, 20)
    """Passes over each of these training sets."""
    augmented: bool = True
    """Train the last of these sets with augmented images too."""
    width: int = 256
    """Units of both hidden layers; the wider network has twice as many."""
    seeds: int = 8
    """Number of seeds that are tested, from 0."""
    rivals: tuple[str, ...] = RIVALS
    """Rivals to train; early stopping and fewer epochs come with nothing."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to save to after each epoch. The same command, given again, goes on from there after a run was stopped
    or killed."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set; see `python -m fashion_jax.data --help`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/when_dropout_helps")
    """Directory to write into."""


def training_sets(flags: Flags) -> list[tuple[int, int, bool]]:
    """Size and epochs of each training set, and whether its images are augmented."""
    plain = [(size, epochs, False) for size, epochs in zip(flags.sizes, flags.epochs, strict=True)]
    return [*plain, (*plain[-1][:2], True)] if flags.augmented else plain


def candidates(width: int, epochs: int, examples: int, augmented: bool) -> dict[str, dict[str, Setting]]:
    """Three settings for each rival."""
    base = TrainConfig(hidden=(width, width), batch_size=128, learning_rate=0.001, flip=augmented, shift=int(augmented))
    base = dataclasses.replace(base, decay_steps=epochs * base.steps_per_epoch(examples))
    wide = dataclasses.replace(base, hidden=(2 * width, 2 * width))
    rates = {"0.1": (0.1, 0.0), "0.3": (0.3, 0.0), "0.5, 0.1 of the input": (0.5, 0.1)}
    speeds = (0.0003, 0.001, 0.003)

    def rate(config, hidden, pixels):
        return Setting(dataclasses.replace(config, input_dropout=pixels), hidden, epochs)

    def changed(config, dropout_rate=0.0, **fields):
        return Setting(dataclasses.replace(config, **fields), dropout_rate, epochs)

    return {
        "nothing": {f"learning rate {speed:g}": changed(base, learning_rate=speed) for speed in speeds},
        "weight decay": {f"{decay:g}": changed(base, weight_decay=decay) for decay in (0.1, 0.3, 1.0)},
        "dropout": {name: rate(base, *shares) for name, shares in rates.items()},
        "wider": {f"learning rate {speed:g}": changed(wide, learning_rate=speed) for speed in speeds},
        "wider, dropout": {name: rate(wide, *shares) for name, shares in rates.items()},
        "dropout, weight decay": {
            f"{share:g} and {decay:g}": changed(base, share, weight_decay=decay)
            for share, decay in ((0.1, 0.1), (0.1, 0.3), (0.3, 0.1))
        },
    }


def stopped(settings: dict[str, Setting], runs: dict[tuple[str, str], Run]) -> dict[str, dict[str, tuple[float, int]]]:
    """Give accuracy and number of epochs of each setting that ends before its last epoch, averaged over the seeds."""
    found: dict[str, dict[str, tuple[float, int]]] = {"early stopping": {}, "fewer epochs": {}}
    for name, setting in settings.items():
        validation = runs["nothing", name].history.validation
        lowest = np.asarray(validation.loss).argmin(axis=1)[:, None]
        at_lowest = np.take_along_axis(np.asarray(validation.accuracy), lowest, axis=1)
        found["early stopping"][name] = float(at_lowest.mean()), setting.epochs
        curve = np.asarray(validation.accuracy).mean(axis=0)
        found["fewer epochs"][name] = float(curve.max()), int(curve.argmax()) + 1
    return found


def highest(accuracies: dict[str, float]) -> str:
    """Name the setting with the highest accuracy; one that stopped with a seed has NaN, and is not it."""
    return max(accuracies, key=lambda name: np.nan_to_num(accuracies[name], nan=-1))


def main(flags: Flags) -> int:
    if flags.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {flags.seeds}")
    if not flags.sizes or len(flags.sizes) != len(flags.epochs):
        raise ValueError(
            f"--sizes and --epochs must name one number each for every training set, got {flags.sizes} and "
            f"{flags.epochs}"
        )
    if len(set(flags.sizes)) < len(flags.sizes) or not 1 <= min(flags.sizes) <= max(flags.sizes) <= TRAINING:
        raise ValueError(f"--sizes must lie between 1 and {TRAINING:,}, and none twice, got {flags.sizes}")
    if min(flags.epochs) < 1:
        raise ValueError(f"--epochs must be at least 1, got {flags.epochs}")
    if "nothing" not in flags.rivals or not set(flags.rivals) <= set(RIVALS):
        raise ValueError(f"--rivals must be some of {', '.join(map(repr, RIVALS))}, nothing among them")
    sweep.use_all_cores()
    train, test = data.load(flags.data_dir)
    train, validation = data.hold_out(train, HOLD_OUT / len(train.labels), key=jax.random.key(0))
    files.prepare_directory(flags.output)
    seeds = range(flags.seeds)

    scores: dict[str, dict[str, calibration.Scores]] = {}
    chosen: dict[str, dict[str, str]] = {}
    ending: dict[str, dict[str, str]] = {}
    tried: dict[str, dict[str, dict[str, float]]] = {}
    for size, epochs, augmented in training_sets(flags):
        title = f"{size:,} images" + (", augmented" if augmented else "")
        part = data.subset(train, size, key=jax.random.key(0))
        rivals = candidates(flags.width, epochs, size, augmented)
        rivals = {rival: rivals[rival] for rival in RIVALS if rival in flags.rivals}
        named = {(rival, name): setting for rival, settings in rivals.items() for name, setting in settings.items()}
        with Progress(epochs * len(search.programs(named))) as progress:
            runs = search.train_settings(
                part, validation, settings=named, seeds=SEARCH_SEEDS, on_epoch=progress, checkpoint=flags.checkpoint
            )
        accuracies = {key: float(run.history.validation.accuracy[:, -1].mean()) for key, run in runs.items()}
        tried[title] = {rival: {name: accuracies[rival, name] for name in rivals[rival]} for rival in rivals}
        ends = stopped(rivals["nothing"], runs)
        tried[title] |= {rival: {name: accuracy for name, (accuracy, _) in of.items()} for rival, of in ends.items()}
        chosen[title] = {rival: highest(of) for rival, of in tried[title].items()}
        final = {rival: rivals[rival][chosen[title][rival]] for rival in rivals}
        for rival, of in ends.items():
            name = chosen[title][rival]
            final[rival] = rivals["nothing"][name]._replace(epochs=of[name][1])
        ending[title] = {
            "early stopping": ", lowest hold-out loss",
            "fewer epochs": f", {final['fewer epochs'].epochs} of {epochs} epochs",
        }
        with Progress(sum(epochs for _, epochs in search.programs(final))) as progress:
            runs = search.train_settings(
                part, validation, settings=final, seeds=seeds, on_epoch=progress, checkpoint=flags.checkpoint
            )
        if any(np.isnan(run.history.running_loss).any() for run in runs.values()):
            raise FloatingPointError(f"{title}: a setting that was chosen stopped with a seed, as was warned of")

        scores[title] = {}
        for rival in ("nothing", *ends, *(rival for rival in rivals if rival != "nothing")):
            params = runs[rival].best.params if rival == "early stopping" else runs[rival].state.params
            config = final[rival].config
            of_seeds = [
                calibration.score(
                    predict(jax.tree.map(lambda leaf, at=seed: leaf[at], params), test.images, config=config),
                    test.labels,
                )
                for seed in seeds
            ]
            scores[title][rival] = jax.tree.map(lambda *leaves: np.stack(leaves), *of_seeds)

    sections = [f"Test set, mean and 95% interval over {report.number_of_seeds(len(seeds))}; NLL in nats."]
    verdicts: dict[str, list[evidence.Verdict]] = {}
    for title, of_rivals in scores.items():
        rows: list[tuple[str, ...]] = [("rival", "chosen", *MEASURES.values())]
        for rival, of_seeds in of_rivals.items():
            cells = [str(evidence.interval(getattr(of_seeds, name))).replace("+", "") for name in MEASURES]
            rows.append((rival, chosen[title][rival] + ending[title].get(rival, ""), *cells))
        verdicts[title] = []
        for first, second in CLAIMS:
            if first not in of_rivals or second not in of_rivals:
                continue
            one, other = of_rivals[first], of_rivals[second]
            verdicts[title] += [
                evidence.compare(
                    f"{first}: more accurate than {second}",
                    one.accuracy,
                    other.accuracy,
                    quantity="accuracy, first minus second",
                ),
                evidence.compare(
                    f"{first}: lower loss than {second}", other.loss, one.loss, quantity="NLL, second minus first"
                ),
            ]
        sections += [f"## {title}", report.markdown(rows), report.verdicts(verdicts[title])]
    count = sum(map(len, verdicts.values()))
    sections.append(f"Of {count} intervals of 95%, {count / 20:g} are expected to miss the truth.")
    print("\n\n".join(sections))

    results = {
        "environment": report.environment(),
        "flags": report.recorded_flags(flags),
        "search seeds": SEARCH_SEEDS,
        "tried": tried,
        "chosen": chosen,
        "ending": ending,
        "test": {
            title: {rival: {name: getattr(of, name).tolist() for name in MEASURES} for rival, of in of_rivals.items()}
            for title, of_rivals in scores.items()
        },
        "verdicts": {title: report.verdicts_as_json(judged) for title, judged in verdicts.items()},
    }
    files.write_atomically(flags.output / "report.json", json.dumps(results, indent=1, default=str) + "\n")
    files.write_atomically(flags.output / "report.md", "\n\n".join(sections) + "\n")
    plot.save(plot.rivals(scores, measures=MEASURES | {"loss": "NLL (nats)"}), flags.output / "rivals.png")
    print(f"rivals.png, report.md and report.json are in {flags.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main, lambda: tyro.cli(Flags, description=__doc__))
