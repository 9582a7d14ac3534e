"""Where the epochs' figures go while training runs: a progress bar, plain lines, or a file of JSON lines."""

import contextlib
import errno
import fcntl
import io
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm.auto import tqdm

from fashion_jax.config import TrainConfig
from fashion_jax.files import write_atomically
from fashion_jax.train import EpochEnd

FIGURES = ("running_loss", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
_RESERVED = ("epoch", "train_size", "config", "dropout_rate", *FIGURES)
_START = b'{"epoch": '
_logger = logging.getLogger(__name__)


class Progress:
    """Show each epoch: a bar on a terminal and in a notebook, one plain line an epoch elsewhere.

    Give it to `fit`, `sweep` or `train_settings` as `on_epoch`; one `Progress` may serve several runs, one after the
    other. Of several seeds it shows the mean.

    Args:
        epochs: Epochs of all runs together, to tell the time left. A run that was complete already reports none, so
            with such runs the time that is told is too long.
        file: Where to write; standard error by default.

    >>> import jax, numpy as np
    >>> from fashion_jax import Batch, fit
    >>> data = Batch(np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.int32))
    >>> with Progress(2, file=sys.stdout) as progress:
    ...     run = fit(data, data, key=jax.random.key(0), epochs=2, on_epoch=progress)  # doctest: +ELLIPSIS
    epoch 1/2, dropout 0: training loss 2..., validation loss 2..., accuracy 0... (... s left)
    epoch 2/2, dropout 0: training loss 2..., validation loss 2..., accuracy 0... (0 s left)
    """

    def __init__(self, epochs: int, *, file: io.TextIOBase | TextIO | None = None):
        self._file = sys.stderr if file is None else file
        self._epochs = epochs
        self._done = self._skipped = self._last = 0
        self._lost = False
        self._run: tuple[Any, ...] = ()
        self._start = time.monotonic()
        self._bar = tqdm(total=epochs, unit="epoch", file=file) if _in_notebook() or self._file.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, end: EpochEnd) -> None:
        """Show one epoch."""
        # A run that goes on from a checkpoint begins with a later epoch.
        run = (end.config, end.train_size, end.dropout_rates, end.seeds, end.epochs)
        skipped = end.epoch - 1 - (self._last if run == self._run and end.epoch > self._last else 0)
        self._run, self._last = run, end.epoch
        self._skipped += skipped
        self._done += 1 + skipped
        validation = end.history.validation
        loss, accuracy = _by_rate(end, validation.loss), _by_rate(end, validation.accuracy)
        rates = " | ".join(f"{rate:g}" for rate in end.dropout_rates)
        left = (time.monotonic() - self._start) / (self._done - self._skipped) * max(0, self._epochs - self._done)
        try:
            if self._bar is not None:
                self._bar.set_postfix(dropout=rates, loss=loss, accuracy=accuracy)
                self._bar.update(1 + skipped)
                return
            training = _by_rate(end, end.history.train.loss)
            print(
                f"epoch {end.epoch}/{end.epochs}, dropout {rates}: training loss {training}, validation loss {loss}, "
                f"accuracy {accuracy} ({left:.0f} s left)",
                file=self._file,
                flush=True,
            )
        except (OSError, ValueError):
            # Nobody reads it any more, which is no reason to end the run. Of a closed file Python says ValueError.
            if not self._lost:
                _logger.warning("progress can no longer be shown", exc_info=True)
            self._lost = True


class JsonLines:
    """Write each epoch into a file that grows: one JSON object a line, one line a network.

    Give it to `fit`, `sweep` or `train_settings` as `on_epoch`. A line has the entries epoch, train_size, config (the
    fields that differ from `TrainConfig()`, if any do), dropout_rate, seed (of a sweep), your own `entries`, and the
    figures running_loss, train_loss, train_accuracy, validation_loss and validation_accuracy: losses in nats, each
    number exactly that of the History; null for a lane that has stopped.

    Lines that agree in all but epoch and figures are of one network. A file keeps what it holds of other networks. Of
    sweeps that differ in their number of epochs alone, as settings may, each adds the epochs that are not there yet.
    Where a network is trained again, from the start or from a checkpoint, its lines from that epoch on give way to the
    new ones; so a run that was killed and goes on leaves each epoch once. A line is written at once and as a whole; the
    half line that a kill may leave is removed when the file is next opened.

    Args:
        path: The file; it and missing parent directories are made.
        **entries: More to write into each line, to tell runs apart, such as the seed of a `fit`: text, numbers, True,
            False or None.

    Raises:
        TypeError: An entry has another type.
        ValueError: An entry has the name of a figure or is not finite; or the file holds something else than such
            lines, and stays as it is.
        OSError: The file cannot be written, or another process is writing into it.

    >>> import jax, tempfile
    >>> from fashion_jax import Batch, fit
    >>> data = Batch(np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.int32))
    >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
    >>> with JsonLines(path, seed=0, note="first try") as log:
    ...     run = fit(data, data, key=jax.random.key(0), epochs=2, on_epoch=log)
    >>> print(path.read_text())  # doctest: +ELLIPSIS
    {"epoch": 1, "train_size": 10, "dropout_rate": 0.0, "seed": 0, "note": "first try", "running_loss": 2...}
    {"epoch": 2, "train_size": 10, "dropout_rate": 0.0, "seed": 0, "note": "first try", "running_loss": 2...}
    <BLANKLINE>
    """

    def __init__(self, path: str | os.PathLike[str], **entries: str | int | float | bool | None):
        self._path = Path(path)
        self._entries = _check_entries(entries)
        # Epoch that each network of this object was logged last in, and that a run of each length reported it last in.
        self._last: dict[str, int] = {}
        self._reported: dict[tuple[str, int | None], int] = {}
        self._file = _open_locked(self._path)
        try:
            self._remove_half_line()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._file.close()

    def __call__(self, end: EpochEnd) -> None:
        """Write the lines of one epoch.

        Raises:
            ValueError: This object has written the epoch already, an entry is the sweep's own seed, or it is closed.
            OSError: The file cannot be written.
        """
        if self._file.closed:
            raise ValueError(f"{self._path}: this log is closed; use a new JsonLines")
        networks = self._networks(end)
        # Seeds make networks the same at any length; the key of a `fit` is not told.
        length = None if end.seeds is None else end.epochs
        for network in networks:
            if self._reported.get((_key(network), length), 0) >= end.epoch:
                raise ValueError(
                    f"{self._path}: epoch {end.epoch} of {_told(network)} was logged before. Give each run a JsonLines "
                    f"of its own, with entries that tell runs apart, such as JsonLines(path, run=1)"
                )
        self._make_way({_key(network) for network in networks} - self._last.keys(), end.epoch)
        validation, train = end.history.validation, end.history.train
        leaves = (end.history.running_loss, train.loss, train.accuracy, validation.loss, validation.accuracy)
        columns = [np.asarray(leaf).ravel().tolist() for leaf in leaves]
        for network, values in zip(networks, zip(*columns, strict=True), strict=True):
            if self._last.get(_key(network), 0) < end.epoch:
                figures = (value if math.isfinite(value) else None for value in values)
                line = {"epoch": end.epoch, **network, **dict(zip(FIGURES, figures, strict=True))}
                self._write(json.dumps(line, allow_nan=False) + "\n")
                self._last[_key(network)] = end.epoch
            self._reported[_key(network), length] = end.epoch

    def _networks(self, end: EpochEnd) -> list[dict[str, Any]]:
        """What sets each lane apart, in the order of the leaves."""
        if end.seeds is not None and "seed" in self._entries:
            raise ValueError(f"seed is told by the sweep; leave it out of JsonLines, which got {self._entries['seed']}")
        usual = TrainConfig().as_dict()
        unusual = {name: value for name, value in end.config.as_dict().items() if value != usual[name]}
        named = [{}] if end.seeds is None else [{"seed": seed} for seed in end.seeds]
        return [
            {
                "train_size": end.train_size,
                **({"config": unusual} if unusual else {}),
                "dropout_rate": rate,
                **seed,
                **self._entries,
            }
            for rate in end.dropout_rates
            for seed in named
        ]

    def _make_way(self, keys: set[str], epoch: int) -> None:
        """Remove what the file holds of these networks from an epoch on."""
        if not keys:
            return
        kept, size = [], 0
        last = dict.fromkeys(keys, 0)
        for text in self._path.read_bytes().splitlines(keepends=True):
            line = json.loads(text)
            key = _key(line)
            if key not in keys or line["epoch"] < epoch:
                kept.append(text)
            if key in keys:
                last[key] = max(last[key], line["epoch"])
            size += len(text)
        behind = [of_network for of_network in last.values() if of_network < epoch - 1]
        if behind:
            told = f"{len(behind)} of {len(keys)} networks" if len(keys) > 1 else "the network"
            first = min(behind) + 1
            _logger.warning("%s lacks lines of the epochs from %d to %d of %s", self._path, first, epoch - 1, told)
        content = b"".join(kept)
        if len(content) < size:
            write_atomically(self._path, content)
            self.close()
            self._file = _open_locked(self._path)

    def _remove_half_line(self) -> None:
        content = self._path.read_bytes()
        whole, newline, half = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else (), start=1):
            if not _is_whole(line):
                raise ValueError(f"{self._path}, line {number}: not a line of such a log; name another file")
        if half and _is_whole(half):
            # Somebody's editor has taken the end of the line away.
            self._file.write(b"\n")
        elif half:
            if _is_json(half) or not (half.startswith(_START) or _START.startswith(half)):
                raise ValueError(f"{self._path}: not a log of JSON lines; name another file")
            self._file.truncate(len(content) - len(half))

    def _write(self, line: str) -> None:
        content, size = line.encode(), os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise OSError(error.errno, f"{error.strerror}; the log ends before this line", str(self._path)) from error


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def _check_entries(entries: dict[str, Any]) -> dict[str, Any]:
    for name, value in entries.items():
        if name in _RESERVED:
            raise ValueError(f"{name} is written into each line already; give this entry another name")
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise TypeError(f"{name} must be text, a number, True, False or None, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    return entries


def _open_locked(path: Path) -> io.FileIO:
    if path.exists() and not path.is_file():
        number, found = (errno.EISDIR, "a directory") if path.is_dir() else (errno.EINVAL, "no regular file")
        raise OSError(number, f"this is {found}; name a file to log into", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line is with the kernel when `write` returns, and outlives the process.
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; no log can be written here", str(path)) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system that has no locks lets everybody in.
        if isinstance(error, BlockingIOError):
            file.close()
            what = "another process is writing into this log; name another file"
            raise BlockingIOError(error.errno, what, str(path)) from error
    return file


def _is_whole(line: bytes) -> bool:
    try:
        entries = json.loads(line)
    except ValueError:
        return False
    return line.startswith(_START) and isinstance(entries["epoch"], int) and entries.keys() >= set(FIGURES)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _key(line: dict[str, Any]) -> str:
    """What a network's lines have in common."""
    return json.dumps({name: line[name] for name in sorted(line) if name not in ("epoch", *FIGURES)})


def _told(network: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in network.items())


def _by_rate(end: EpochEnd, leaf) -> str:
    """Give the mean over seeds for each dropout rate; lanes that have stopped are left out."""
    rows = np.reshape(leaf, (len(end.dropout_rates), -1))
    return " | ".join(f"{row[np.isfinite(row)].mean():.4f}" if np.isfinite(row).any() else "stopped" for row in rows)
