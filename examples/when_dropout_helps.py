"""When does dropout help? Dropout against its rivals, three settings each, chosen on a hold-out and tested once."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import optax
from matplotlib.figure import Figure

from fashion_jax import FashionMLP, Progress, TrainConfig, evaluate, hold_out, load, predict, report, subset, sweep
from fashion_jax.augment import shift_and_flip
from fashion_jax.calibration import score
from fashion_jax.devices import use_all_cores
from fashion_jax.evidence import compare, interval
from fashion_jax.script import exit_if_interrupted, logger, publish, run_script

MEASURES = {"accuracy": "accuracy", "loss": "NLL (nats)", "calibration_error": "ECE"}
SPEEDS, RATES = {"learning_rate": (0.0003, 0.001, 0.003)}, {"dropout_rate": (0.1, 0.3, 0.5)}
# Width of both layers, and settings; early stopping takes the parameters with the lowest hold-out loss.
RIVALS: dict[str, tuple[int, dict[str, Any]]] = {
    "nothing": (256, SPEEDS),
    "early stopping": (256, SPEEDS),
    "weight decay": (256, {"weight_decay": (0.1, 0.3, 1.0)}),
    "dropout": (256, RATES),
    "dropout, weight decay": (256, RATES | {"weight_decay": 0.1}),
    "wider": (512, SPEEDS),
    "wider, dropout": (512, RATES),
}
CLAIMS = [("dropout", rival) for rival in ("nothing", "early stopping", "weight decay")]
CLAIMS += [("dropout, weight decay", "weight decay"), ("wider, dropout", "wider")]


@dataclasses.dataclass(frozen=True)
class Flags:
    # Sizes of training sets, at most 50,000, and epochs of each.
    sets: tuple[tuple[int, int], ...] = ((1_000, 100), (10_000, 40), (50_000, 20))
    augment: bool = False  # Move and mirror the training images at random.
    seeds: int = 8  # Number of seeds that are tested, from 0; others choose the settings.
    checkpoint: Path | None = None  # Directory to save every epoch to; the same command resumes from there.
    data_dir: Path | None = None  # Directory with the data set.
    output: Path = Path("runs/when_dropout_helps")  # Directory to write to.


def main(flags: Flags) -> None:
    use_all_cores()
    train, test = load(data_dir=flags.data_dir)
    train, validation = hold_out(train, 1 / 6, key=jax.random.key(0))
    augment = functools.partial(shift_and_flip, pixels=1) if flags.augment else None
    figure, tables, tested = Figure(figsize=(11, 2.6 * len(flags.sets)), layout="constrained"), {}, {}
    grid = figure.subplots(len(flags.sets), len(MEASURES), sharey=True, squeeze=False)
    for panels, (size, epochs) in zip(grid, flags.sets, strict=True):
        part, title = subset(train, size, key=jax.random.key(0)), f"{size:,} images{', augmented' * flags.augment}"
        schedule = optax.cosine_decay_schedule(1.0, epochs * -(-size // 128))

        def adamw(learning_rate=0.001, weight_decay=0.0, schedule=schedule):
            return optax.adamw(lambda step: learning_rate * schedule(step), weight_decay=weight_decay)

        scores, rows = {}, [["rival", "chosen", *MEASURES.values()]]
        for rival, (width, numbers) in RIVALS.items():
            logger.info("%s, %s", title, rival)
            config = TrainConfig(FashionMLP((width, width)), adamw, augment=augment, batch_size=128)
            run = functools.partial(sweep, part, validation, config=config, epochs=epochs, callbacks=[Progress()])
            place = flags.checkpoint and flags.checkpoint / title / rival
            search = run(seeds=(1_000, 1_001), checkpoint=place and place / "search", **numbers)
            exit_if_interrupted(search.history, epochs)
            (name, values), end = next(iter(numbers.items())), "best" if rival == "early stopping" else "state"
            runs = {value: getattr(search.at(**{name: value}), end) for value in values}
            accuracy = {v: evaluate(r.params, validation, config=config).accuracy.mean() for v, r in runs.items()}
            chosen = {name: max(values, key=accuracy.__getitem__)}
            result = run(seeds=range(flags.seeds), checkpoint=place and place / "chosen", **numbers | chosen)
            exit_if_interrupted(result.history, epochs)
            scores[rival] = score(predict(getattr(result, end).params, test.images, config=config), test.labels)
            rows.append([rival, f"{name} {chosen[name]:g}"])
            for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
                measured = interval(getattr(scores[rival], measure))
                rows[-1].append(str(measured).replace("+", ""))
                axes.errorbar(measured.mean, rival, xerr=measured.high - measured.mean, fmt="o", capsize=3)
                axes.set(xlabel=label, ylim=(len(RIVALS) - 0.5, -0.5))
        panels[0].set_title(title, loc="left")
        pairs = {f"{a}: more accurate than {b}": (scores[a].accuracy, scores[b].accuracy) for a, b in CLAIMS}
        verdicts = [compare(claim, *pair, quantity="first minus second") for claim, pair in pairs.items()]
        tables |= {f"{title}: test set, mean and 95% interval": rows, f"{title}: paired": report.verdicts(verdicts)}
        tested[title] = {rival: {measure: getattr(of, measure) for measure in MEASURES} for rival, of in scores.items()}
    publish(flags, tables, {"rivals": figure}, report={"test": tested})


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
