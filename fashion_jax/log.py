"""Where the epochs' figures go while training runs: a progress bar, or plain lines."""

import io
import sys
import time
from typing import TextIO

import numpy as np
from tqdm.auto import tqdm

from fashion_jax.train import EpochEnd


class Progress:
    """Show each epoch: a bar on a terminal and in a notebook, one plain line an epoch elsewhere.

    Give it to `fit` or `sweep` as `on_epoch`; one `Progress` may serve several runs, one after the other. Of several
    seeds it shows the mean.

    Args:
        epochs: Epochs of all runs together, to tell the time left.
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
        self._start = time.monotonic()
        in_notebook = "ipykernel" in sys.modules
        self._bar = tqdm(total=epochs, unit="epoch", file=file) if in_notebook or self._file.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, end: EpochEnd) -> None:
        """Show one epoch."""
        # A run that goes on from a checkpoint begins with a later epoch.
        skipped = end.epoch - 1 - (self._last if end.epoch > self._last else 0)
        self._last = end.epoch
        self._skipped += skipped
        self._done += 1 + skipped
        validation = end.history.validation
        loss, accuracy = _by_rate(end, validation.loss), _by_rate(end, validation.accuracy)
        rates = " | ".join(f"{rate:g}" for rate in end.dropout_rates)
        if self._bar is not None:
            self._bar.set_postfix(dropout=rates, loss=loss, accuracy=accuracy)
            self._bar.update(1 + skipped)
            return
        left = (time.monotonic() - self._start) / (self._done - self._skipped) * (self._epochs - self._done)
        print(
            f"epoch {end.epoch}/{end.epochs}, dropout {rates}: training loss {_by_rate(end, end.history.train.loss)}, "
            f"validation loss {loss}, accuracy {accuracy} ({left:.0f} s left)",
            file=self._file,
            flush=True,
        )


def _by_rate(end: EpochEnd, leaf) -> str:
    """Give the mean over seeds for each dropout rate; lanes that have stopped are left out."""
    rows = np.reshape(leaf, (len(end.dropout_rates), -1))
    return " | ".join(f"{row[np.isfinite(row)].mean():.4f}" if np.isfinite(row).any() else "stopped" for row in rows)
