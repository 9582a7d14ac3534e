"""Records of runs: the machine, every number as JSON, and Markdown tables to read."""

import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from fashion_jax import __version__, _checks
from fashion_jax.evidence import LAST, summarize
from fashion_jax.statistics import MOST_SEEDS, Interval, Verdict
from fashion_jax.types import History, Metrics

# Flags about files, on which no result depends.
PLACES = ("cache", "checkpoint", "data_dir", "format", "log", "output")


def environment() -> dict[str, Any]:
    """Return the devices, processor, versions and XLA flags that results depend on.

    >>> sorted(environment())
    ['devices', 'platform', 'processor', 'processor_model', 'threads', 'versions', 'xla_flags']
    """
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        **_processor(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"python": platform.python_version(), "fashion_jax": __version__, **versions},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def machine(about: Mapping[str, Any]) -> str:
    """Return one line on the machine that `environment` describes, for pictures.

    >>> machine({"platform": "gpu", "devices": ["NVIDIA H200"], "versions": {"jax": "0.10.1"}})
    'NVIDIA H200, jax 0.10.1'
    """
    devices = about["devices"]
    cpu = about["platform"] == "cpu"
    name = f"{about['processor']}, {about['threads']} cores" if cpu else " and ".join(sorted({*devices}))
    return f"{name}, jax {about['versions']['jax']}"


def as_json(record: Any) -> str:
    """Return a record as JSON text; equal records give equal text.

    Args:
        record: Mappings, sequences, numbers, arrays, named tuples such as `History` or `Verdict`, and dataclasses such
            as flags or a `TrainConfig`, without `PLACES`. NaN and infinity become null, everything else its text.

    >>> json.loads(as_json({"plain": Metrics(np.array([0.5, np.nan]), np.array([0.8, 0.9]))}))
    {'plain': {'loss': [0.5, None], 'accuracy': [0.8, 0.9]}}
    """
    return json.dumps(_plain(record), indent=1, allow_nan=False) + "\n"


def table(arms: Mapping[str, History]) -> str:
    """Return a Markdown table of each arm's metrics, as mean ± std over seeds; losses in nats.

    "final" is the mean of the last five epochs, "last" the last one, which the tutorial shows, and "best" that of each
    run's lowest validation loss.

    Args:
        arms: Title and history of each arm; leaves [seeds, epochs].

    Raises:
        TypeError, ValueError: An arm is no History with leaves [seeds, epochs] of finite numbers.

    >>> curve = np.array([[0.5, 0.4, 0.45]])
    >>> print(table({"no dropout": History(curve, Metrics(curve, curve), Metrics(curve, curve))}))
    | arm        | epoch      | training loss (running) | training loss (eval mode) | validation loss | accuracy |
    |------------|------------|-------------------------|---------------------------|-----------------|----------|
    | no dropout | final: 1-3 | 0.4500                  | 0.4500                    | 0.4500          | 0.4500   |
    | no dropout | last: 3    | 0.4500                  | 0.4500                    | 0.4500          | 0.4500   |
    | no dropout | best: 2    | 0.4000                  | 0.4000                    | 0.4000          | 0.4000   |
    """
    rows = [["arm", "epoch", "training loss (running)", "training loss (eval mode)", "validation loss", "accuracy"]]
    for title, history in arms.items():
        _checks.history(f"arms[{title!r}]", history, "seeds", "epochs")
        seeds, epochs = np.shape(history.running_loss)
        curves = (history.running_loss, history.train.loss, history.validation.loss, history.validation.accuracy)
        final = _checks.evaluated(history)[-LAST:]
        chosen = {"final": np.tile(final, (seeds, 1)), "last": np.full((seeds, 1), epochs)}
        chosen["best"] = summarize(history).best_epoch[:, None]
        for name, numbers in chosen.items():
            span = "-".join(map(str, sorted({int(numbers.min()), int(numbers.max())})))
            means = [np.take_along_axis(np.asarray(curve), numbers - 1, axis=1).mean(axis=1) for curve in curves]
            rows.append([title, f"{name}: {span}", *map(mean_and_std, means)])
    return markdown(rows)


def verdicts(judged: Sequence[Verdict], p_values: Iterable[float] | None = None) -> str:
    """Return a Markdown table of verdicts: claim, answer, the measured mean with its 95% interval, and p-values.

    >>> from fashion_jax.statistics import compare
    >>> print(verdicts([compare("it helps", np.array([0.9]), np.array([0.8]), quantity="accuracy")]))
    | claim    | answer                               | measured (mean, 95% interval)             |
    |----------|--------------------------------------|-------------------------------------------|
    | it helps | undecided (one seed decides nothing) | accuracy: +0.1000 (one seed, no interval) |
    """
    rows = [["claim", "answer", "measured (mean, 95% interval)"]]
    for verdict in judged:
        answer = f"{verdict.answer} ({verdict.note})" if verdict.note else verdict.answer
        rows.append([verdict.claim, answer, f"{verdict.quantity}: {verdict.interval}"])
    if p_values is not None:
        rows = [[*row, p] for row, p in zip(rows, ["p", *(f"{p:.2g}" for p in p_values)], strict=True)]
    return markdown(rows)


def intervals(columns: Mapping[str, Mapping[str, Interval]]) -> str:
    """Return a Markdown table of means with their 95% intervals; every column has the same rows.

    >>> from fashion_jax.statistics import interval
    >>> print(intervals({"accuracy": {"dropout": interval(np.array([0.88, 0.89, 0.9]))}}))
    |         | accuracy                |
    |---------|-------------------------|
    | dropout | 0.8900 [0.8652, 0.9148] |
    """
    rows = {
        name: [str(column[name]).replace("+", "") for column in columns.values()]
        for name in next(iter(columns.values()))
    }
    return markdown([["", *columns], *([name, *cells] for name, cells in rows.items())])


def outlook(judged: Sequence[Verdict], seconds_a_seed: float | None = None) -> str:
    """Return one line: how many claims are undecided, and how many seeds and minutes would decide them.

    Args:
        judged: The verdicts.
        seconds_a_seed: Time of all arms of one seed on this machine, if known.

    >>> from fashion_jax.statistics import compare
    >>> outlook([compare("it helps", np.array([0.9, 0.8, 0.9]), np.array([0.8, 0.8, 0.8]), quantity="accuracy")], 60.0)
    '1 of 1 claims is undecided; about 6 seeds would decide it, in 6 minutes on this machine'
    """
    undecided = [verdict for verdict in judged if verdict.answer == "undecided"]
    if not undecided:
        return f"all {len(judged)} claims are decided"
    found = f"{len(undecided)} of {len(judged)} claims {'is' if len(undecided) == 1 else 'are'} undecided"
    seeds = [verdict.seeds_needed() or 0 for verdict in undecided]
    if not all(seeds):
        return f"{found}; one seed decides nothing, and two show how many it takes"
    them = "it" if len(undecided) == 1 else "them"
    found += f"; about {max(seeds):,}{' or more' * (max(seeds) == MOST_SEEDS)} seeds would decide {them}"
    if seconds_a_seed is None:
        return found
    minutes = math.ceil(max(seeds) * seconds_a_seed / 60)
    return f"{found}, in {minutes:,} minute{'s' * (minutes > 1)} on this machine"


def read_curves(path: str | os.PathLike[str]) -> dict[float, History]:
    """Read reference curves, such as those of PyTorch runs: one row per run, dropout rate and epoch.

    Args:
        path: A CSV file with the columns run, dropout_rate, epoch, running_train_loss, test_loss, test_accuracy.

    Returns:
        A history for each rate, leaves [runs, epochs], runs by name; its training metrics (eval mode) are NaN.

    Raises:
        ValueError: A column is missing, a cell is no number, or a run lacks an epoch or has one twice.

    >>> curves = read_curves("tests/reference/pytorch_curves.csv")
    >>> curves[0.2].validation.loss.shape
    (3, 30)
    """
    names = ("dropout_rate", "epoch", "running_train_loss", "test_loss", "test_accuracy")
    try:
        # Spreadsheets begin a file with a byte order mark.
        with _checks.path("path", path).open(newline="", encoding="utf-8-sig") as file:
            heading, *rows = filter(None, csv.reader(file))
        columns = dict(zip(heading, zip(*rows, strict=True), strict=True))
        rate, epoch, *curves = (np.array(columns[name], np.float64) for name in names)
        run = np.array(columns["run"])
    except (csv.Error, KeyError, ValueError) as error:
        raise ValueError(f"{path} must have the columns run, {', '.join(names)}, with numbers: {error!r}") from error
    arms, order = {}, np.lexsort((epoch, run, rate))
    for arm in np.unique(rate).tolist():
        here = order[rate[order] == arm]
        runs = len(np.unique(run[here]))
        last = -(-len(here) // runs)
        if epoch[here].tolist() != runs * list(range(1, last + 1)):
            raise ValueError(f"{path}: each of the {runs} runs at rate {arm:g} must have epochs 1 to {last}, once")
        running, loss, accuracy = (curve[here].reshape(runs, last) for curve in curves)
        unknown = np.full((runs, last), np.nan)
        arms[arm] = History(running, Metrics(unknown, unknown), Metrics(loss, accuracy))
    return arms


def mean_and_std(values: Sequence[float] | Float[Array | np.ndarray, " runs"]) -> str:
    """Format numbers of several runs as mean ± standard deviation, and of one run as the number.

    >>> mean_and_std([0.25, 0.75])
    '0.5000 ± 0.3536'
    """
    values = np.asarray(values, np.float64)
    return f"{values.mean():.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else "")


def markdown(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows of cells, the first of them the heading, as an aligned Markdown table.

    >>> print(markdown([("a", "b"), (1, "2|2")]))
    | a | b    |
    |---|------|
    | 1 | 2\\|2 |
    """
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|-" + "-|-".join("-" * width for width in widths) + "-|")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    # A dataclass that can be called is a Flax module, which becomes its text.
    if dataclasses.is_dataclass(value) and not callable(value):
        value = {name: entry for name, entry in vars(value).items() if name not in PLACES}
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = value.tolist()
    if isinstance(value, (list, tuple, range)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    # Addresses in memory differ each time.
    return re.sub(r" at 0x\w+", "", " ".join(str(value).split()))


def _processor() -> dict[str, str]:
    """Return the processor's name, and its model: vendors give one name to several models."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", text, re.MULTILINE))
    name = found.pop("model name", platform.processor() or platform.machine())
    return {"processor": name, "processor_model": ", ".join(map(" ".join, found.items()))}
