"""What is written down about runs: the machine, the figures of every epoch, and the table that a person reads."""

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fashion_jax.config import TrainConfig
from fashion_jax.train import History


def environment() -> dict[str, Any]:
    """Tell what a result depends on besides the code: device, processor and versions.

    >>> sorted(environment())
    ['devices', 'platform', 'processor', 'threads', 'versions']
    """
    packages = ("fashion_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def as_json(arms: Mapping[str, History], *, seeds: list[int], config: TrainConfig, **more: Any) -> dict[str, Any]:
    """Collect every figure of every epoch, and what is needed to make them again, as plain JSON values.

    Args:
        arms: Title and History of each arm; leaves [runs, epochs].
        seeds: The seed of each run.
        config: The config that all runs share.
        **more: Further entries, such as the dropout rates.

    >>> from fashion_jax.train import Metrics
    >>> curve = np.array([[0.5, 0.4]])
    >>> arms = {"no dropout": History(curve, Metrics(curve, curve), Metrics(curve, curve))}
    >>> as_json(arms, seeds=[0], config=TrainConfig())["arms"]["no dropout"]["train"]["loss"]
    [[0.5, 0.4]]
    """
    return {
        "environment": environment(),
        "config": dataclasses.asdict(config),
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


def table(arms: Mapping[str, History]) -> str:
    """Lay out each arm's figures at its last and at its best epoch, as mean +- standard deviation over runs.

    The best epoch is that of the lowest validation loss, run by run.

    Args:
        arms: Title and History of each arm; leaves [runs, epochs].

    Returns:
        A Markdown table; the losses are in nats.

    >>> from fashion_jax.train import Metrics
    >>> curve = np.array([[0.5, 0.4, 0.45]])
    >>> print(table({"no dropout": History(curve, Metrics(curve, curve), Metrics(curve, curve))}))
    | arm        | epoch   | running training loss | fair training loss | validation loss | accuracy |
    |------------|---------|-----------------------|--------------------|-----------------|----------|
    | no dropout | last: 3 | 0.4500                | 0.4500             | 0.4500          | 0.4500   |
    | no dropout | best: 2 | 0.4000                | 0.4000             | 0.4000          | 0.4000   |
    """
    heading = ("arm", "epoch", "running training loss", "fair training loss", "validation loss", "accuracy")
    rows: list[tuple[str, ...]] = [heading]
    for title, history in arms.items():
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(history)]
        running, train_loss, _, validation_loss, accuracy = leaves
        runs, epochs = running.shape
        best = validation_loss.argmin(axis=1)
        for name, epoch in (("last", np.full(runs, epochs - 1)), ("best", best)):
            spread = f"{epoch.min() + 1}" if epoch.min() == epoch.max() else f"{epoch.min() + 1}-{epoch.max() + 1}"
            figures = [
                mean_and_sd(leaf[np.arange(runs), epoch]) for leaf in (running, train_loss, validation_loss, accuracy)
            ]
            rows.append((title, f"{name}: {spread}", *figures))
    return markdown(rows)


def mean_and_sd(values) -> str:
    """Format figures of several runs as mean +- standard deviation, of one run as it is.

    >>> mean_and_sd([0.25, 0.75])
    '0.5000 ± 0.3536'
    """
    values = np.asarray(values, np.float64)
    return f"{values.mean():.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else "")


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows of text, the first of them the heading, as an aligned Markdown table.

    >>> print(markdown([("a", "b"), ("1", "22")]))
    | a | b  |
    |---|----|
    | 1 | 22 |
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
