"""Callbacks for `fit` and `sweep`: progress on the screen, epochs as JSON lines, early stopping.

A callback is any function of an `EpochEnd`; the run ends after an epoch for which one returns True. With several
processes each one calls its callbacks; those of this module write in the first one alone.

>>> import tempfile, jax
>>> from fashion_jax import Batch, fit
>>> data, path = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100) % 10), tempfile.mkdtemp() + "/log.jsonl"
>>> callbacks = [Progress(sys.stdout), JsonLines(path, seed=7), EarlyStopping(patience=1, min_delta=1.0)]
>>> run = fit(data, data, key=jax.random.key(7), callbacks=callbacks)  # doctest: +ELLIPSIS
epoch 1/30: training loss 2.3..., validation loss 2.3..., accuracy 0.1000
epoch 2/30: training loss 2.3..., validation loss 2.3..., accuracy 0.1000
>>> read_json_lines(path)[1]["validation_loss"] == run.history.validation.loss[1]
np.True_
"""

import contextlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fashion_jax import _checks
from fashion_jax.types import History, TrainState

FEW = 4  # Settings of a sweep whose figures fit into one line.


class EpochEnd(NamedTuple):
    """The argument that a callback receives after each epoch.

    Attributes:
        epoch: The epoch that has ended, from 1.
        epochs: The number of epochs asked for.
        axes: Name and values of each axis of a sweep; empty for `fit`.
        hyperparameters: The numbers that do not vary.
        history: Metrics after each epoch so far, leaves [*axes, epochs].
        fetch_state: Returns the state after the epoch, leaves [*axes, ...], copied to the host. With several processes
            every one has to call it.
    """

    epoch: int
    epochs: int
    axes: Mapping[str, tuple[Any, ...]]
    hyperparameters: Mapping[str, float]
    history: History
    fetch_state: Callable[[], TrainState]

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dictionary per run: hyperparameters, seed, epoch, and the five metrics.

        >>> from fashion_jax.types import Metrics
        >>> curve = np.array([0.5])
        >>> history = History(curve, Metrics(curve, curve), Metrics(curve, curve))
        >>> end = EpochEnd(1, 2, {}, {"dropout_rate": 0.2}, history, dict)
        >>> end.rows()[0]["dropout_rate"], end.rows()[0]["validation_loss"]
        (0.2, 0.5)
        """
        rows = []
        for index in np.ndindex(*map(len, self.axes.values())):
            lane = {name: values[i] for (name, values), i in zip(self.axes.items(), index, strict=True)}
            curves = {name: float(curve[index][-1]) for name, curve in self.history.curves().items()}
            rows.append({**self.hyperparameters, **lane, "epoch": self.epoch, **curves})
        return rows


Callback = Callable[[EpochEnd], bool | None]


def shown(callbacks: Iterable[Callback], progress: bool | None) -> list[Callback]:
    """Return the callbacks, plus a `Progress` if requested, unless there is one.

    If `progress` is None, it is requested on a terminal and in a notebook.
    """
    found = _checks.functions("callbacks", callbacks)
    if progress not in (True, False, None):
        raise TypeError(f"progress must be True, False or None, got {_checks.got(progress)}")
    wanted = _watched(sys.stderr) if progress is None else progress
    return found + [Progress()] * (wanted and not any(isinstance(callback, Progress) for callback in found))


class Progress:
    """Show each epoch: a bar on a terminal and in a notebook, one plain line per epoch elsewhere.

    A sweep's figures are means over seeds for each combination of its other axes; of more than four combinations, the
    lowest and the highest mean. Runs that diverged are left out. One object may serve several runs.

    Args:
        file: An open text file, by default standard error. A run continues even if nobody reads it anymore.
    """

    def __init__(self, file: Any = None):
        self._file, self._bar, self._last = file, None, 0

    def __call__(self, end: EpochEnd) -> None:
        """Show one epoch."""
        if jax.process_index() > 0:
            return
        # A closed file raises ValueError, and standard error may be None.
        with contextlib.suppress(OSError, ValueError):
            if file := self._file or sys.stderr:
                self._show(end, file)

    def _show(self, end: EpochEnd, file: Any) -> None:
        with warnings.catch_warnings(action="ignore"):  # A notebook without ipywidgets has a bar of text.
            from tqdm.auto import tqdm

        if end.epoch == 1 or end.epoch != self._last + 1:
            self._bar = None
        self._last, where = end.epoch % end.epochs, {"total": end.epochs, "initial": end.epoch, "file": file}
        history = end.history
        curves = {"training loss": history.train.loss, "validation loss": history.validation.loss}
        curves |= {"accuracy": history.validation.accuracy}
        if np.shape(history.running_loss)[-1] not in _checks.evaluated(history):
            curves = {"training loss (running)": history.running_loss}
        figures = ", ".join(f"{name} {_means(end, curve)}" for name, curve in curves.items())
        if not _watched(file):
            epoch = ", ".join(filter(None, (f"epoch {end.epoch}/{end.epochs}", _settings(end))))
            print(f"{epoch}: {figures}", file=file, flush=True)
        elif self._bar is None:
            # The first epoch, which compiles, would spoil the estimate of the time left.
            self._bar = tqdm(desc=_settings(end), unit="epoch", postfix=figures, **where)
        else:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        if self._bar and end.epoch == end.epochs:
            self._bar.close()


class JsonLines:
    """Append each epoch to a file, one JSON object per run: hyperparameters, seed, epoch and metrics; NaN becomes null.

    Lines are never changed: a run that was killed and resumes may repeat an epoch, see `read_json_lines`.

    Args:
        path: The file; it and missing parent directories are made.
        **entries: Further entries that identify the run, such as the seed of a `fit` or the size of its training set.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], **entries: Any):
        self._path, self._entries = _checks.path("path", path), json.loads(json.dumps(entries))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.open("ab").close()

    def __call__(self, end: EpochEnd) -> None:
        """Append the lines of one epoch."""
        if jax.process_index() > 0:
            return
        rows = [self._entries | {k: None if v != v else v for k, v in row.items()} for row in end.rows()]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with self._path.open("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            ends_in_half_a_line = file.read() not in (b"", b"\n")
            file.write(b"\n" + content if ends_in_half_a_line else content)


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a file of `JsonLines`: one dictionary per run and epoch, for example for `pandas.DataFrame`.

    Of lines with the same entries up to the epoch, only the last counts; a partial line of a killed process is skipped.
    """
    rows: dict[str, dict[str, Any]] = {}
    for line in _checks.path("path", path).read_bytes().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[json.dumps(list(itertools.takewhile(lambda entry: entry[0] != "running_loss", row.items())))] = row
    return list(rows.values())


class EarlyStopping:
    """End a run whose validation loss has not improved for some time; `run.best` holds its best parameters.

    A sweep ends when none of its runs has improved for as long.

    Args:
        patience: Evaluations without improvement after which the run ends; there is one after each epoch, unless
            `TrainConfig.evaluate_every` says otherwise.
        min_delta: How much lower a loss has to be to count as an improvement, in nats.
    """

    def __init__(self, patience: int = 5, min_delta: float = 0.0):
        self._patience = _checks.integer("patience", patience, 1)
        self._min_delta = _checks.number("min_delta", min_delta)

    def __call__(self, end: EpochEnd) -> bool:
        """Return whether the run should end."""
        best, improved = np.array(np.inf), 0
        losses = np.asarray(end.history.validation.loss)[..., _checks.evaluated(end.history) - 1]
        for evaluation, loss in enumerate(np.moveaxis(losses, -1, 0), start=1):
            better = loss < best - self._min_delta
            if np.any(better):
                best, improved = np.where(better, loss, best), evaluation
        return losses.shape[-1] - improved >= self._patience


def _watched(file: Any) -> bool:
    """Return whether this is a terminal, or a notebook."""
    return (file is not None and not getattr(file, "closed", False) and file.isatty()) or _in_notebook()


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def _settings(end: EpochEnd) -> str:
    axes = {name: values for name, values in end.axes.items() if name != "seed"}
    settings = ["/".join(map("{:g}".format, values)) for values in itertools.product(*axes.values())]
    return f"{'/'.join(axes)} {' | '.join(settings)}".strip() if len(settings) <= FEW else f"{len(settings)} settings"


def _means(end: EpochEnd, curve: Any) -> str:
    runs = np.reshape(curve[..., -1], (-1, len(end.axes.get("seed", [None]))))
    means = np.ma.masked_invalid(runs).mean(axis=1).filled(np.nan)
    if len(means) > FEW:
        return f"{np.nanmin(means):.4f} to {np.nanmax(means):.4f}"
    return " | ".join(f"{mean:.4f}" for mean in means)
