"""What is written down about runs: the machine, the figures of every epoch, and the table that a person reads."""

import csv
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fashion_jax import __version__
from fashion_jax.config import TrainConfig, check_config
from fashion_jax.evidence import FEW_SEEDS, Summary, Verdict, check_history, summarise
from fashion_jax.train import History, Metrics

# Flags that say where a script reads and writes.
PLACES = ("checkpoint", "data_dir", "log", "output")


def environment() -> dict[str, Any]:
    """Tell what a result depends on besides the code: device, processor, versions, and XLA's flags.

    >>> sorted(environment())
    ['devices', 'platform', 'processor', 'threads', 'versions', 'xla_flags']
    """
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            # Not from its metadata, which a checkout that is not installed does not have.
            "fashion_jax": __version__,
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def as_json(arms: Mapping[str, History], *, seeds: list[int], config: TrainConfig, **more: Any) -> dict[str, Any]:
    """Collect every figure of every epoch, and what is needed to make them again, as plain JSON values.

    Args:
        arms: Title and History of each arm; leaves [..., epochs].
        seeds: The seed of each run.
        config: The config that all runs share.
        **more: Further entries, such as the dropout rates.

    Raises:
        TypeError: An arm is not a History, or `config` not a TrainConfig.
        ValueError: There is no arm, or a leaf has other axes.

    >>> from fashion_jax.train import Metrics
    >>> curve = np.array([[0.5, 0.4]])
    >>> arms = {"no dropout": History(curve, Metrics(curve, curve), Metrics(curve, curve))}
    >>> as_json(arms, seeds=[0], config=TrainConfig())["arms"]["no dropout"]["train"]["loss"]
    [[0.5, 0.4]]
    """
    _check_arms(arms)
    check_config(config)
    return {
        "environment": environment(),
        "config": config.as_dict(),
        "seeds": seeds,
        **more,
        "arms": {
            title: {
                "running_loss": np.asarray(history.running_loss).tolist(),
                "train": {name: np.asarray(leaf).tolist() for name, leaf in history.train._asdict().items()},
                "validation": {name: np.asarray(leaf).tolist() for name, leaf in history.validation._asdict().items()},
            }
            for title, history in arms.items()
        },
    }


def recorded_flags(flags: Any) -> dict[str, Any]:
    """Give a script's flags, a dataclass, as a record keeps them: without places, on which no figure depends.

    >>> flags = dataclasses.make_dataclass("Flags", ["epochs", "output"])(30, "runs/here")
    >>> recorded_flags(flags)
    {'epochs': 30}
    """
    return {name: value for name, value in dataclasses.asdict(flags).items() if name not in PLACES}


def summaries(arms: Mapping[str, History]) -> dict[str, Any]:
    """Give each arm's `evidence.summarise` as plain JSON values, one number a run.

    Args:
        arms: Title and History of each arm; leaves [..., epochs].

    Raises:
        TypeError: An arm is not a History.
        ValueError: There is no arm, a leaf has other axes, or a loss is not finite.

    >>> from fashion_jax.train import Metrics
    >>> curve = np.array([[0.5, 0.25]])
    >>> arms = {"no dropout": History(curve, Metrics(curve, curve), Metrics(curve, curve))}
    >>> summaries(arms)["no dropout"]["best_epoch"]
    [2]
    """
    _check_arms(arms)
    return {
        title: {name: leaf.tolist() for name, leaf in _summary(title, history)._asdict().items()}
        for title, history in arms.items()
    }


def table(arms: Mapping[str, History]) -> str:
    """Lay out each arm's figures at its last and at its best epoch, as mean +- standard deviation over runs.

    The best epoch is that of the lowest validation loss, run by run.

    Args:
        arms: Title and History of each arm; leaves [runs, epochs].

    Returns:
        A Markdown table; the losses are in nats.

    Raises:
        TypeError: An arm is not a History.
        ValueError: There is no arm, a leaf has other axes, or a loss is not finite.

    >>> from fashion_jax.train import Metrics
    >>> curve = np.array([[0.5, 0.4, 0.45]])
    >>> print(table({"no dropout": History(curve, Metrics(curve, curve), Metrics(curve, curve))}))
    | arm        | epoch   | running training loss | fair training loss | validation loss | accuracy |
    |------------|---------|-----------------------|--------------------|-----------------|----------|
    | no dropout | last: 3 | 0.4500                | 0.4500             | 0.4500          | 0.4500   |
    | no dropout | best: 2 | 0.4000                | 0.4000             | 0.4000          | 0.4000   |
    """
    _check_arms(arms, axes=("runs", "epochs"))
    heading = ("arm", "epoch", "running training loss", "fair training loss", "validation loss", "accuracy")
    rows: list[tuple[str, ...]] = [heading]
    for title, history in arms.items():
        running, training = np.asarray(history.running_loss, np.float64), np.asarray(history.train.loss, np.float64)
        loss, accuracy = (np.asarray(leaf, np.float64) for leaf in history.validation)
        runs, epochs = running.shape
        for name, epoch in (("last", np.full(runs, epochs)), ("best", _summary(title, history).best_epoch)):
            spread = f"{epoch.min()}" if epoch.min() == epoch.max() else f"{epoch.min()}-{epoch.max()}"
            at = (np.arange(runs), epoch - 1)
            figures = [mean_and_sd(leaf[at]) for leaf in (running, training, loss, accuracy)]
            rows.append((title, f"{name}: {spread}", *figures))
    return markdown(rows)


def verdicts(judged: Sequence[Verdict]) -> str:
    """Lay out verdicts as a Markdown table: claim, answer, and the number with its 95% interval.

    >>> from fashion_jax.evidence import Interval
    >>> print(verdicts([Verdict("it helps", "undecided", "loss", Interval(0.1, -0.1, 0.3, 0.5, 2), "weak: 2 seeds")]))
    | claim    | answer                    | measured (mean, 95% interval)    |
    |----------|---------------------------|----------------------------------|
    | it helps | undecided (weak: 2 seeds) | loss: +0.1000 [-0.1000, +0.3000] |
    """
    rows: list[tuple[str, ...]] = [("claim", "answer", "measured (mean, 95% interval)")]
    for verdict in judged:
        answer = verdict.answer + (f" ({verdict.note})" if verdict.note else "")
        rows.append((verdict.claim, answer, f"{verdict.quantity}: {verdict.interval}"))
    return markdown(rows)


def verdicts_as_json(judged: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Give verdicts as plain JSON values; a bound that does not exist is null.

    >>> from fashion_jax.evidence import Interval
    >>> nan = float("nan")
    >>> verdicts_as_json([Verdict("it helps", "undecided", "loss", Interval(0.1, nan, nan, nan, 1), "")])[0]["interval"]
    {'mean': 0.1, 'low': None, 'high': None, 'effect_size': None, 'n': 1}
    """
    return [
        verdict._asdict()
        | {
            "interval": {
                name: value if np.isfinite(value) else None for name, value in verdict.interval._asdict().items()
            }
        }
        for verdict in judged
    ]


def read_curves(path: str | os.PathLike[str]) -> dict[float, History]:
    """Read reference curves: one row a run, dropout rate and epoch.

    Args:
        path: A CSV file with the columns run, dropout_rate, epoch, running_train_loss, test_loss, test_accuracy.

    Returns:
        For each rate a History with leaves [runs, epochs]; the fair training curve, which nobody measured, is NaN.

    Raises:
        OSError: The file cannot be read.
        ValueError: A column is missing, a cell is no number, or a run does not have each epoch from 1 to the last once.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "curves.csv"
    >>> columns = "run,dropout_rate,epoch,running_train_loss,test_loss,test_accuracy"
    >>> _ = path.write_text(columns + "\\na,0.2,1,0.6,0.5,0.8\\na,0.2,2,0.5,0.4,0.9\\n")
    >>> read_curves(path)[0.2].running_loss.tolist()
    [[0.6, 0.5]]
    """
    # Spreadsheets put a mark in front.
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file ({error})") from error
    columns = ("running_train_loss", "test_loss", "test_accuracy")
    missing = {"run", "dropout_rate", "epoch", *columns} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    for line, row in enumerate(rows, start=2):
        for column in ("dropout_rate", "epoch", *columns):
            try:
                number = float(row[column])
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {line}: {column} must be a number, got {row[column]!r}") from None
            # Figures may be: those of a run that was stopped are NaN.
            if column not in columns and not np.isfinite(number):
                raise ValueError(f"{path}, line {line}: {column} must be finite, got {row[column]!r}")
    arms: dict[float, History] = {}
    for rate in sorted({float(row["dropout_rate"]) for row in rows}):
        here = [row for row in rows if float(row["dropout_rate"]) == rate]
        runs = [[row for row in here if row["run"] == run] for run in dict.fromkeys(row["run"] for row in here)]
        last = max(map(len, runs))
        for run in runs:
            run.sort(key=lambda row: float(row["epoch"]))
            epochs = [float(row["epoch"]) for row in run]
            if epochs != list(range(1, last + 1)):
                raise ValueError(
                    f"{path}: a run must have each epoch from 1 to {last} once; run {run[0]['run']} at dropout rate "
                    f"{rate:g} has {', '.join(f'{epoch:g}' for epoch in epochs)}"
                )
        running, loss, accuracy = (
            np.array([[float(row[column]) for row in run] for run in runs]) for column in columns
        )
        unknown = np.full_like(running, np.nan)
        arms[rate] = History(running, Metrics(unknown, unknown), Metrics(loss, accuracy))
    return arms


def mean_and_sd(values: Sequence[float] | np.ndarray) -> str:
    """Format figures of several runs as mean +- standard deviation, of one run as it is.

    >>> mean_and_sd([0.25, 0.75])
    '0.5000 ± 0.3536'
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must have shape [runs] with at least one run, got {list(values.shape)}")
    return f"{values.mean():.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else "")


def number_of_seeds(count: int) -> str:
    """Say how many seeds there are, and whether they are too few to decide much.

    >>> [number_of_seeds(count) for count in (1, 2, 8)]
    ['1 seed, which decides nothing', '2 seeds, which are few', '8 seeds']
    """
    if count == 1:
        return "1 seed, which decides nothing"
    return f"{count} seeds" + (", which are few" if count < FEW_SEEDS else "")


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows of text, the first of them the heading, as an aligned Markdown table.

    >>> print(markdown([("a", "b"), ("1", "22")]))
    | a | b  |
    |---|----|
    | 1 | 22 |
    """
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"rows must be of one length, the first of them the heading; got {[len(row) for row in rows]}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _check_arms(arms: Mapping[str, History], axes: tuple[str, ...] | None = None) -> None:
    if not isinstance(arms, Mapping):
        raise TypeError(f"arms must map titles to Histories, got {type(arms).__name__}")
    if not arms:
        raise ValueError("arms must hold at least one History, got none")
    for title, history in arms.items():
        check_history(history, f"arms[{title!r}]", axes=axes)


def _summary(title: str, history: History) -> Summary:
    try:
        return summarise(history)
    except ValueError as error:
        raise ValueError(f"arms[{title!r}]: {error}") from error


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
