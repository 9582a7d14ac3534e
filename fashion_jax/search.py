"""Many settings: train each with several seeds, on as few compiled programs as there can be.

Which setting is best is then a question to the Histories, asked of examples held out from training.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fashion_jax.checkpoint import Checkpoints
from fashion_jax.config import TrainConfig, check_count
from fashion_jax.data import Batch
from fashion_jax.model import check_rate
from fashion_jax.signals import noting_signals
from fashion_jax.sweep import check_seeds, rates_as_trained, stopped_run, sweep
from fashion_jax.train import History, NonFiniteLossError, OnEpoch, Run, check_run


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
        For each name a Run of NumPy arrays, whose leaves have a leading axis [seeds]. A network whose loss is not
        finite stays where it was, and its History is NaN from then on; a warning names the setting, and the others go
        on. So look for NaN before you choose: NumPy takes it for the least and for the highest.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, in the last epoch too; what was trained is in the checkpoint directory.
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument is out of range, there is no setting, a checkpoint could not tell settings apart, or it
            belongs to another search.
        MemoryError: A device has no room for so many lanes.
        OSError: The checkpoint directory cannot be written, or another run uses it.

    >>> data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> small, wide = TrainConfig(hidden=(8,)), TrainConfig(hidden=(16,))
    >>> settings = {"small": Setting(small, 0.0, 1), "dropped": Setting(small, 0.5, 1), "wide": Setting(wide, 0.0, 2)}
    >>> runs = train_settings(data, data, settings=settings, seeds=[0, 1, 2])
    >>> {name: run.history.running_loss.shape for name, run in runs.items()}
    {'small': (3, 1), 'dropped': (3, 1), 'wide': (3, 2)}
    """
    settings, seeds = _checked(settings), check_seeds(seeds)
    for name, setting in settings.items():
        # Of all, before the first is trained: the last one's turn may come hours later.
        try:
            check_run(train, validation, config=setting.config, on_epoch=on_epoch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"settings[{name!r}] cannot be trained: {error}") from error
    needed = programs(settings)
    places = dict.fromkeys(needed) if checkpoint is None else _places(needed, seeds, checkpoint)
    runs: dict[Any, Run] = {}
    with noting_signals(terminate=checkpoint is not None) as noted:
        for (config, epochs), rates in needed.items():
            try:
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
            except NonFiniteLossError as error:
                run = stopped_run(error.run, config=config, dropout_rates=rates, seeds=seeds, epochs=epochs)
            if noted:
                break
            for name, setting in settings.items():
                if (setting.config, setting.epochs) == (config, epochs):
                    lane = rates_as_trained(rates).index(rates_as_trained([setting.dropout_rate])[0])
                    runs[name] = jax.tree.map(lambda leaf, lane=lane: np.asarray(leaf[lane]), run)
                    _warn_of_stopped(name, runs[name].history)
    # In the very last epoch, too: nothing else tells a script not to start its next search.
    if noted:
        raise KeyboardInterrupt
    return {name: runs[name] for name in settings}


def programs(settings: Mapping[Any, Setting]) -> dict[tuple[TrainConfig, int], list[float]]:
    """Tell which programs the settings need: config and epochs of each, and its dropout rates, the lowest first.

    Programs with fewer epochs come first: a log that goes on then holds no later epochs, which would give way. Rates
    that are alike in the programs' type, as 0.3 and 0.1 + 0.2 are, are one lane.

    Args:
        settings: Name of each setting, and the setting.

    >>> settings = {"none": Setting(TrainConfig()), "some": Setting(TrainConfig(), 0.2)}
    >>> list(programs(settings).values())
    [[0.0, 0.2]]
    """
    found: dict[tuple[TrainConfig, int], list[float]] = {}
    for setting in sorted(settings.values(), key=lambda setting: (setting.epochs, setting.dropout_rate)):
        rates = found.setdefault((setting.config, setting.epochs), [])
        if rates_as_trained([setting.dropout_rate])[0] not in rates_as_trained(rates):
            rates.append(setting.dropout_rate)
    return found


def _checked(settings) -> dict[Any, Setting]:
    """Refuse what are no settings; give them with Python's own numbers."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must map names to Settings, got {type(settings).__name__}")
    if not settings:
        raise ValueError("settings must hold at least one Setting, got none")
    checked = {}
    for name, setting in settings.items():
        told = f"settings[{name!r}]"
        if not isinstance(setting, Setting):
            raise TypeError(f"{told} must be a Setting, got {setting!r}")
        if not isinstance(setting.config, TrainConfig):
            raise TypeError(f"{told}.config must be a TrainConfig, got {setting.config!r}")
        rate = check_rate(setting.dropout_rate, f"{told}.dropout_rate")
        epochs = check_count(f"{told}.epochs", setting.epochs, 1)
        checked[name] = Setting(setting.config, rate, epochs)
    return checked


def _warn_of_stopped(name, history: History) -> None:
    lost = np.isnan(history.running_loss)
    if lost.any():
        warnings.warn(
            f"settings[{name!r}]: the loss of {lost.any(axis=1).sum()} of {len(lost)} seeds is not finite, from epoch "
            f"{lost.any(axis=0).argmax() + 1} on or later; they stay there, and their History is NaN from then on",
            stacklevel=3,
        )


def _places(needed, seeds, checkpoint) -> dict[tuple[TrainConfig, int], Checkpoints]:
    """Name a directory for each program, by what it trains."""
    places = {}
    for (config, epochs), rates in needed.items():
        about = json.dumps([config.as_dict(), epochs, rates, seeds])
        places[config, epochs] = Checkpoints.of(checkpoint).within(hashlib.sha256(about.encode()).hexdigest()[:16])
    if len(set(places.values())) < len(places):
        raise ValueError(
            "settings differ in functions of the same name, which a checkpoint cannot tell apart; make them by "
            "functools.partial from a named function, or give no checkpoint"
        )
    return places
