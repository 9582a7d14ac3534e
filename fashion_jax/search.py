"""Many settings: train each with several seeds, on as few compiled programs as there can be.

Which setting is best is then a question to the Histories, asked of examples held out from training.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fashion_jax.checkpoint import Checkpoints
from fashion_jax.config import TrainConfig
from fashion_jax.data import Batch
from fashion_jax.signals import noting_signals
from fashion_jax.sweep import sweep
from fashion_jax.train import OnEpoch, Run


class Setting(NamedTuple):
    """What one candidate is trained with.

    Attributes:
        config: What is fixed at compile time.
        dropout_rate: Share of hidden units to drop.
        epochs: Passes over the training set.
    """

    config: TrainConfig
    dropout_rate: float = 0.0
    epochs: int = 30


def train_settings(
    train: Batch,
    validation: Batch,
    *,
    settings: Mapping[Any, Setting],
    seeds: Sequence[int],
    on_epoch: OnEpoch | None = None,
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
) -> dict[Any, Run]:
    """Train every setting with every seed; those that differ in their dropout rate alone are lanes of one program.

    Args:
        train: Training examples.
        validation: Validation examples.
        settings: Name of each setting, and the setting.
        seeds: Seed of each run, no two alike.
        on_epoch: Called after each epoch of each program, with an `EpochEnd`.
        checkpoint: A directory to save to and to go on from; each program has a directory of its own inside.

    Returns:
        For each name a Run of NumPy arrays, whose leaves have a leading axis [seeds].

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, in the last epoch too; what was trained is in the checkpoint directory.
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument is out of range, there is no setting, or a checkpoint could not tell settings apart.

    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> small, wide = TrainConfig(hidden=(8,)), TrainConfig(hidden=(16,))
    >>> settings = {"small": Setting(small, 0.0, 1), "dropped": Setting(small, 0.5, 1), "wide": Setting(wide, 0.0, 2)}
    >>> runs = train_settings(data, data, settings=settings, seeds=[0, 1, 2])
    >>> {name: run.history.running_loss.shape for name, run in runs.items()}
    {'small': (3, 1), 'dropped': (3, 1), 'wide': (3, 2)}
    """
    if not settings:
        raise ValueError("settings must hold at least one Setting, got none")
    for name, setting in settings.items():
        if not isinstance(setting, Setting):
            raise TypeError(f"settings[{name!r}] must be a Setting, got {setting!r}")
    places = dict.fromkeys(programs(settings)) if checkpoint is None else _places(settings, seeds, checkpoint)
    runs: dict[Any, Run] = {}
    with noting_signals(terminate=checkpoint is not None) as noted:
        for (config, epochs), rates in programs(settings).items():
            run = sweep(
                train,
                validation,
                seeds=seeds,
                dropout_rates=rates,
                config=config,
                epochs=epochs,
                on_epoch=on_epoch,
                checkpoint=places[config, epochs],
            )
            if noted:
                break
            for name, setting in settings.items():
                if (setting.config, setting.epochs) == (config, epochs):
                    lane = rates.index(setting.dropout_rate)
                    runs[name] = jax.tree.map(lambda leaf, lane=lane: np.asarray(leaf[lane]), run)
    # In the very last epoch, too: nothing else tells a script not to start its next search.
    if noted:
        raise KeyboardInterrupt
    return {name: runs[name] for name in settings}


def programs(settings: Mapping[Any, Setting]) -> dict[tuple[TrainConfig, int], list[float]]:
    """Tell which programs the settings need: config and epochs of each, and its dropout rates.

    Args:
        settings: Name of each setting, and the setting.

    >>> settings = {"none": Setting(TrainConfig()), "some": Setting(TrainConfig(), 0.2)}
    >>> list(programs(settings).values())
    [[0.0, 0.2]]
    """
    found: dict[tuple[TrainConfig, int], list[float]] = {}
    for setting in settings.values():
        rates = found.setdefault((setting.config, setting.epochs), [])
        if setting.dropout_rate not in rates:
            rates.append(setting.dropout_rate)
    return found


def _places(settings, seeds, checkpoint) -> dict[tuple[TrainConfig, int], Checkpoints]:
    """Name a directory for each program, by what it trains."""
    places = {}
    for (config, epochs), rates in programs(settings).items():
        about = json.dumps([config.as_dict(), epochs, list(map(float, rates)), list(map(int, seeds))])
        places[config, epochs] = Checkpoints.of(checkpoint).within(hashlib.sha256(about.encode()).hexdigest()[:16])
    if len(set(places.values())) < len(places):
        raise ValueError(
            "settings differ in functions of the same name, which a checkpoint cannot tell apart; make them by "
            "functools.partial from a named function, or give no checkpoint"
        )
    return places
