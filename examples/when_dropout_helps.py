"""When does dropout help? Dropout against its rivals, four settings each, chosen on a hold-out and tested once."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import optax

from fashion_jax import FashionMLP, Progress, TrainConfig, evaluate, predict, report, sweep, use_all_cores
from fashion_jax.augment import shift_and_flip
from fashion_jax.calibration import score
from fashion_jax.data import hold_out, load, subset
from fashion_jax.evidence import compare_rivals
from fashion_jax.networks import NormalizedMLP
from fashion_jax.plot import intervals
from fashion_jax.script import TrainingFlags, exit_if_interrupted, flag, logger, publish, run_script
from fashion_jax.statistics import holm, interval

MEASURES = {"accuracy": "accuracy", "loss": "NLL (nats)", "calibration_error": "ECE"}
SPEEDS = {"learning_rate": (0.0001, 0.0003, 0.001, 0.003)}
RATES = {"dropout_rate": (0.1, 0.3, 0.5, 0.7)}
# Network and settings. Early stopping takes the parameters with the lowest hold-out loss.
RIVALS = {
    "nothing": (FashionMLP(), SPEEDS),
    "early stopping": (FashionMLP(), SPEEDS),
    "weight decay": (FashionMLP(), {"weight_decay": (0.1, 0.3, 1.0, 3.0)}),
    "dropout": (FashionMLP(), RATES),
    "weight decay, dropout": (FashionMLP(), RATES | {"weight_decay": 0.1}),
    "batch norm": (NormalizedMLP(), SPEEDS),
    "batch norm, dropout": (NormalizedMLP(), RATES),
    "layer norm": (NormalizedMLP(norm="layer"), SPEEDS),
    "wider": (FashionMLP((512, 256, 128)), SPEEDS),
    "wider, dropout": (FashionMLP((512, 256, 128)), RATES),
}
PAIRS = [("dropout", rival) for rival in ("nothing", "early stopping", "weight decay", "batch norm", "layer norm")]
PAIRS += [(f"{rival}, dropout", rival) for rival in ("weight decay", "batch norm", "wider")]


@dataclasses.dataclass(frozen=True)
class Flags(TrainingFlags):
    images: int = 10_000  # Size of the training sets, at most 50,000.
    epochs: int = 40  # Passes over each training set.
    augment: bool = False  # Shift and flip the training images at random.
    subsets: int = 8  # Number of training sets, two seeds each, that are tested; another one chooses the settings.
    output: Path = Path("runs/when_dropout_helps")  # Directory to write to.


def main(flags: Flags) -> None:
    use_all_cores()
    train, test = load(data_dir=flags.data_dir)
    train, validation = hold_out(train, 1 / 6, key=jax.random.key(0))
    schedule = optax.cosine_decay_schedule(1.0, flags.epochs * -(-flags.images // 128))

    def adamw(learning_rate=0.001, weight_decay=0.0):
        return optax.adamw(lambda step: learning_rate * schedule(step), weight_decay=weight_decay)

    augment, scores, chosen = functools.partial(shift_and_flip, pixels=1) if flags.augment else None, {}, {}
    for rival, (model, numbers) in RIVALS.items():
        config = TrainConfig(model, adamw, augment=augment, batch_size=128, evaluate_every=-(-flags.epochs // 20))
        how = {"config": config, "epochs": flags.epochs, "callbacks": [Progress()]}
        (name, values), tested = next(iter(numbers.items())), []
        for number in reversed(range(flags.subsets + 1)):
            logger.info("%s, training set %d", rival, number)
            with flag("--images"):
                part = subset(train, flags.images, key=jax.random.key(number))
            place = flags.checkpoint and flags.checkpoint / rival / str(number)
            result = sweep(part, validation, seeds=(2 * number, 2 * number + 1), checkpoint=place, **how, **numbers)
            exit_if_interrupted(result.history, flags.epochs)
            end = result.best if rival == "early stopping" else result.state
            if number < flags.subsets:
                tested.append(score(predict(end, test.images, config=config), test.labels))
                continue
            best = evaluate(end, validation, config=config).accuracy.mean(axis=1).argmax()
            numbers = numbers | {name: values[int(best)]}
        # Seeds that share a training set are one observation.
        scores[rival] = {of: np.array([getattr(one, of).mean() for one in tested]) for of in MEASURES}
        chosen[rival] = f"{name} {numbers[name]:g}"
    panels = {label: {rival: interval(of[name]) for rival, of in scores.items()} for name, label in MEASURES.items()}
    judged = compare_rivals(scores, PAIRS)
    tables = {f"Test set, mean and 95% interval over {flags.subsets} training sets:": report.intervals(panels)}
    tables["Chosen on the hold-out:"] = report.markdown([("rival", "setting"), *chosen.items()])
    tables[f"Paired; p-values are adjusted for {len(judged)} claims (Holm):"] = report.verdicts(judged, holm(judged))
    publish(flags, tables, {"rivals": intervals(panels)}, report={"chosen": chosen, "test": scores})


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
