"""Train with and without dropout, several seeds each, and compare the losses: the tutorial's experiment."""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from fashion_jax import FashionMLP, JsonLines, Progress, TrainConfig, evaluate, predict, report, sweep, use_all_cores
from fashion_jax.data import DATA_SETS, hold_out, load, subset
from fashion_jax.evidence import compare_rivals, drop_diverged, judge
from fashion_jax.plot import claims, classification, losses, overlay, samples
from fashion_jax.script import TrainingFlags, exit_if_interrupted, flag, logger, publish, run_script

REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "pytorch_curves.csv"

ENDS, EARLY = {"last": "state", "best": "best"}, "no dropout, best"


@dataclasses.dataclass(frozen=True)
class Flags(TrainingFlags):
    data: Literal["fashion_mnist", "mnist", "kmnist"] = "fashion_mnist"  # Data set to train on.
    epochs: int = 30  # Passes over the training set.
    seeds: int = 8  # Number of seeds, from 0; each trains once at every rate.
    rates: tuple[float, ...] = (0.0, 0.2)  # Dropout rates in [0, 1). Verdicts compare rate 0 with each of the others.
    learning_rate: float = 0.003  # Learning rate of the optimizer.
    batch_size: int = 64  # Images per step.
    hidden: tuple[int, ...] = (256, 128, 64)  # Width of each hidden layer.
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad", "nadam", "lion"] = "adam"  # Optimizer from optax.
    train_size: int | None = None  # Number of training images to use, stratified by class; all by default.
    holdout: float = 0.0  # Share of the training images to validate on; 0 validates on the test set, like the tutorial.
    reference: bool = False  # Draw three PyTorch runs under the curves.
    log: Path | None = None  # File to append every epoch's metrics to, as JSON lines.
    output: Path = Path("runs/compare_overfit")  # Directory to write to.
    distributed: bool = False  # Train together with the other tasks of a SLURM or Open MPI job, or of a TPU slice.


def main(flags: Flags) -> None:
    use_all_cores()
    train, validation = splits = load(flags.data, data_dir=flags.data_dir)
    if flags.holdout:
        train, validation = hold_out(train, flags.holdout, key=jax.random.key(0))
    with flag("--train-size"):
        train = subset(train, flags.train_size or len(train.labels), key=jax.random.key(0))
    curves = report.read_curves(REFERENCE) if flags.reference else {}
    if flags.reference and (others := {*flags.rates} - curves.keys()):
        logger.warning("--reference has no curves of rate %s", ", ".join(map(str, sorted(others))))
    config = TrainConfig(FashionMLP(flags.hidden), getattr(optax, flags.optimizer), batch_size=flags.batch_size)
    clock: list[float] = []
    callbacks = [*([JsonLines(flags.log)] if flags.log else []), Progress(), lambda _: clock.append(time.monotonic())]
    how = {"epochs": flags.epochs, "callbacks": callbacks, "checkpoint": flags.checkpoint, "dropout_rate": flags.rates}
    how["learning_rate"] = flags.learning_rate
    result = sweep(train, validation, seeds=range(flags.seeds), config=config, **how)
    arms = {f"dropout {rate:g}" if rate else "no dropout": result.at(dropout_rate=rate) for rate in flags.rates}
    histories = drop_diverged({name: arm.history for name, arm in arms.items()})
    tables: dict[str, Any] = {"Mean ± std over seeds; losses in nats:": report.table(histories)}
    reference = {name: curves[rate] for name, rate in zip(arms, flags.rates, strict=True) if rate in curves}
    figures = {"losses": losses(histories, reference=reference), "arms": overlay(histories)}
    tested, plain = {}, histories.get("no dropout")
    verdicts = {name: judge(plain, arm, name=name) for name, arm in histories.items() if plain and arm is not plain}
    for name, of_arm in verdicts.items():
        tables[f"No dropout against {name}:"] = report.verdicts(of_arm)
        figures[f"claims_{name.split()[1]}" if len(verdicts) > 1 else "claims"] = claims(of_arm)
    if flags.holdout:
        ends = {f"{name}, {end}": getattr(arm, of) for name, arm in arms.items() for end, of in ENDS.items()}
        tested = {name: evaluate(end, splits.test, config=config) for name, end in ends.items()}
        rows = [[name, *map(report.mean_and_std, metrics)] for name, metrics in tested.items()]
        tables["Test set, touched once:"] = [["arm and epoch", "test loss", "accuracy"], *rows]
        pairs = [(name, EARLY) for name in tested if name != EARLY and EARLY in tested]
        against = compare_rivals({name: metrics._asdict() for name, metrics in tested.items()}, pairs)
        tables["Test set, against early stopping without dropout:"] = report.verdicts(against)
    if judged := [verdict for of_arm in verdicts.values() for verdict in of_arm]:
        tables["Enough seeds?"] = report.outlook(judged)
    state, label = result.at(dropout_rate=flags.rates[-1], seed=0).state, int(splits.test.labels[0])
    names, probabilities = DATA_SETS[flags.data].class_names, predict(state, splits.test.images[:1], config=config)[0]
    figures["prediction"] = classification(splits.test.images[0], probabilities, class_names=names, label=label)
    figures["samples"] = samples(train.images[:900])
    results = {"verdicts": verdicts, "test": tested, "best": {name: arm.best.epoch for name, arm in arms.items()}}
    publish(flags, tables, figures, history={"config": config, "arms": histories}, report=results)
    if judged and len(clock) > 1:
        logger.info(report.outlook(judged, (clock[-1] - clock[0]) / (len(clock) - 1) * flags.epochs / flags.seeds))
    exit_if_interrupted(result.history, flags.epochs)


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
