"""Train with and without dropout, several seeds each, and compare the losses: the tutorial's experiment."""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from fashion_jax import FashionMLP, JsonLines, Progress, TrainConfig, evaluate, predict, report, sweep, use_all_cores
from fashion_jax.data import CLASS_NAMES, hold_out, load, subset
from fashion_jax.evidence import drop_diverged, judge
from fashion_jax.plot import claims, classification, losses, samples
from fashion_jax.script import exit_if_interrupted, flag, logger, publish, run_script

REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "pytorch_curves.csv"


@dataclasses.dataclass(frozen=True)
class Flags:
    epochs: int = 30  # Passes over the training set.
    seeds: int = 8  # Number of seeds, from 0; each trains once at every rate.
    rates: tuple[float, ...] = (0.0, 0.2)  # Dropout rates in [0, 1). Verdicts compare 0 with each other one.
    learning_rate: float = 0.003  # Learning rate of the optimizer.
    batch_size: int = 64  # Images a step.
    hidden: tuple[int, ...] = (256, 128, 64)  # Width of each hidden layer.
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad", "nadam", "lion"] = "adam"  # One of optax's.
    train_size: int | None = None  # Training images to use, the same share of each class; all by default.
    holdout: float = 0.0  # Share of the training images to validate on; 0 takes the test set, as the tutorial does.
    reference: bool = False  # Draw three PyTorch runs under the curves.
    checkpoint: Path | None = None  # Directory to save every epoch to; the same command resumes from there.
    log: Path | None = None  # File to append every epoch's metrics to, as JSON lines.
    data_dir: Path | None = None  # Directory with the data set.
    output: Path = Path("runs/compare_overfit")  # Directory to write to.
    distributed: bool = False  # Train together with the other tasks of a SLURM or Open MPI job, or of a TPU slice.


def main(flags: Flags) -> None:
    use_all_cores()
    train, validation = splits = load(data_dir=flags.data_dir)
    with flag("--holdout, --train-size"):
        if flags.holdout:
            train, validation = hold_out(train, flags.holdout, key=jax.random.key(0))
        if flags.train_size is not None:
            train = subset(train, flags.train_size, key=jax.random.key(0))
    model, optimizer = FashionMLP(hidden=flags.hidden), getattr(optax, flags.optimizer)
    config = TrainConfig(model=model, optimizer=optimizer, batch_size=flags.batch_size)
    clock: list[float] = []
    callbacks = [*([JsonLines(flags.log)] if flags.log else []), Progress(), lambda _: clock.append(time.monotonic())]
    how = {"config": config, "epochs": flags.epochs, "callbacks": callbacks, "checkpoint": flags.checkpoint}
    result = sweep(
        train, validation, seeds=range(flags.seeds), dropout_rate=flags.rates, learning_rate=flags.learning_rate, **how
    )
    arms = {f"dropout {rate:g}" if rate else "no dropout": result.at(dropout_rate=rate) for rate in flags.rates}
    histories = drop_diverged({name: arm.history for name, arm in arms.items()})
    tables: dict[str, Any] = {"Mean ± std over seeds; losses in nats:": report.table(histories)}
    curves = report.read_curves(REFERENCE) if flags.reference else {}
    reference = {name: curves[rate] for name, rate in zip(arms, flags.rates, strict=True) if rate in curves}
    figures, tested, plain = {"losses": losses(histories, reference=reference)}, {}, histories.get("no dropout")
    dropped = {name: arm for name, arm in histories.items() if arm is not plain}
    verdicts = {} if plain is None else {name: judge(plain, arm, name=name) for name, arm in dropped.items()}
    for name, of_arm in verdicts.items():
        tables[f"No dropout against {name}:"] = report.verdicts(of_arm)
        figures[f"claims_{name.split()[1]}" if len(verdicts) > 1 else "claims"] = claims(of_arm)
    if flags.holdout:
        tables["Test set, touched once:"] = rows = [["arm", "epoch", "hold-out loss", "test loss", "accuracy"]]
        for name, arm in arms.items():
            ends = {"last": (arm.state, arm.history.validation.loss[:, -1]), "best": (arm.best, arm.best.loss)}
            for end, (state, loss) in ends.items():
                epoch = f"{end}: {arm.best.epoch.mean():.1f}" if end == "best" else f"{end}: {flags.epochs}"
                tested[f"{name}, {end}"] = metrics = evaluate(state, splits.test, config=config)
                rows.append([name, epoch, *map(report.mean_and_std, (loss, *metrics))])
    judged = [verdict for of_arm in verdicts.values() for verdict in of_arm]
    if judged:
        tables["Enough seeds?"] = report.outlook(judged)

    state, label = result.at(dropout_rate=flags.rates[-1], seed=0).state, int(splits.test.labels[0])
    probabilities = predict(state, splits.test.images[:1], config=config)[0]
    figures["prediction"] = classification(splits.test.images[0], probabilities, class_names=CLASS_NAMES, label=label)
    figures["samples"] = samples(train.images[:900])
    results = {"verdicts": verdicts, "test": tested}
    publish(flags, tables, figures, history={"config": config, "arms": histories}, report=results)
    if judged and len(clock) > 1:
        logger.info(report.outlook(judged, (clock[-1] - clock[0]) / (len(clock) - 1) * flags.epochs / flags.seeds))
    exit_if_interrupted(result.history, flags.epochs)


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
