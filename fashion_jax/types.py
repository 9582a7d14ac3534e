"""The values that travel: data, metrics, states and results. This module imports nothing of the package.

A leaf is an array whose axes grow in front: [epochs] for a run, [..., epochs] with one axis a varied hyperparameter and
one for the seeds for a sweep.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

if TYPE_CHECKING:
    import xarray

Params = dict[str, Any]


class Batch(NamedTuple):
    """Images and their labels; a data set is one large batch.

    Attributes:
        images: Raw pixels, 0 (background) to 255.
        labels: Class index of each image.
    """

    images: UInt8[Array | np.ndarray, "n height width *channels"]
    labels: Int[Array | np.ndarray, " n"]

    def __repr__(self) -> str:
        return f"Batch(images={_shape(self.images)}, labels={_shape(self.labels)})"


class Splits(NamedTuple):
    """The official split: 60,000 training and 10,000 test images for Fashion-MNIST."""

    train: Batch
    test: Batch

    def __repr__(self) -> str:
        return f"Splits(\n  train={self.train!r},\n  test={self.test!r},\n)"


class Metrics(NamedTuple):
    """Mean negative log likelihood in nats, and the fraction of examples classified correctly."""

    loss: Float[Array | np.ndarray, "*axes"]
    accuracy: Float[Array | np.ndarray, "*axes"]


class History(NamedTuple):
    """Metrics after each epoch; every leaf ends with the axis [epochs].

    Attributes:
        running_loss: Mean of the batch losses while training, dropout on: the tutorial's training curve.
        train: Metrics on a fixed part of the training set after the epoch, dropout off.
        validation: The same on the validation set.
    """

    running_loss: Float[Array | np.ndarray, "*axes"]
    train: Metrics
    validation: Metrics

    def curves(self) -> dict[str, Any]:
        """Return the five curves by name, as in tables, logs and data frames.

        >>> list(History(0.1, Metrics(0.2, 0.9), Metrics(0.3, 0.8)).curves())
        ['running_loss', 'train_loss', 'train_accuracy', 'validation_loss', 'validation_accuracy']
        """
        return {
            "running_loss": self.running_loss,
            "train_loss": self.train.loss,
            "train_accuracy": self.train.accuracy,
            "validation_loss": self.validation.loss,
            "validation_accuracy": self.validation.accuracy,
        }

    def __repr__(self) -> str:
        return f"History({list(np.shape(self.running_loss))}, last: {_last(self)})"


class TrainState(NamedTuple):
    """Everything that a training step updates. It holds no key: seed and `step` determine all further draws.

    Attributes:
        params: The model's parameters, such as {"fc1": {"kernel": [in, out], "bias": [out]}, ...}.
        opt_state: The optimizer's state.
        step: Number of steps taken.
    """

    params: Params
    opt_state: Any
    step: Int[Array | np.ndarray, "*lanes"]


class Best(NamedTuple):
    """The parameters after the epoch with the lowest validation loss: the result of early stopping.

    Attributes:
        params: The model's parameters.
        loss: Validation loss, in nats; infinite before the first epoch.
        epoch: The epoch, from 1; 0 before the first.
    """

    params: Params
    loss: Float[Array | np.ndarray, "*lanes"]
    epoch: Int[Array | np.ndarray, "*lanes"]

    def __repr__(self) -> str:
        if np.ndim(self.loss):
            return f"Best({list(np.shape(self.loss))}, validation loss {np.mean(self.loss):.4f} on average)"
        return f"Best(epoch {int(self.epoch)}, validation loss {float(self.loss):.4f})"


class Run(NamedTuple):
    """One trained network.

    Attributes:
        state: The state after the last epoch.
        history: Metrics after each epoch, leaves [epochs].
        best: The parameters after the best epoch.
    """

    state: TrainState
    history: History
    best: Best

    def __repr__(self) -> str:
        epochs = np.shape(self.history.running_loss)[-1]
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.state.params))
        return f"Run({epochs} epochs, {size:,} parameters,\n  last: {_last(self.history)},\n  best: {self.best!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class Sweep:
    """Many trained networks; every leaf has the axes in `axes` in front.

    Attributes:
        axes: Name and values of each axis, in order; the last one is "seed".
        state: The states after the last epoch, leaves [*axes, ...].
        history: Metrics after each epoch, leaves [*axes, epochs].
        best: The parameters after each run's best epoch, leaves [*axes, ...].
    """

    axes: Mapping[str, tuple[Any, ...]]
    state: TrainState
    history: History
    best: Best

    def at(self, **values: float) -> Any:
        """Return the part of the sweep with the given values, such as `at(dropout_rate=0.2)`.

        Args:
            **values: A value of each axis to select from; these axes disappear.

        Returns:
            A `Sweep` with the axes that are left, or a `Run` if none is.

        Raises:
            KeyError: There is no such axis, or it has no such value.

        >>> leaf = np.arange(6.0).reshape(2, 3, 1)
        >>> history = History(leaf, Metrics(leaf, leaf), Metrics(leaf, leaf))
        >>> state = TrainState({}, (), np.zeros((2, 3), int))
        >>> best = Best({}, np.zeros((2, 3)), np.ones((2, 3), int))
        >>> result = Sweep({"dropout_rate": (0.0, 0.2), "seed": (0, 1, 2)}, state, history, best)
        >>> result.at(dropout_rate=0.2).history.validation.loss.ravel().tolist()
        [3.0, 4.0, 5.0]
        """
        for name, value in values.items():
            if name not in self.axes:
                raise KeyError(f"there is no axis {name!r}; the axes are {', '.join(self.axes)}")
            if value not in self.axes[name]:
                raise KeyError(f"{name} is one of {', '.join(map(str, self.axes[name]))}; got {value!r}")
        index = tuple(self.axes[name].index(values[name]) if name in values else slice(None) for name in self.axes)
        left = {name: axis for name, axis in self.axes.items() if name not in values}
        parts = jax.tree.map(lambda leaf: leaf[index], (self.state, self.history, self.best))
        return Sweep(left, *parts) if left else Run(*parts)

    def to_xarray(self) -> "xarray.Dataset":
        """Return the history as an `xarray.Dataset` whose dimensions are the axes and the epoch.

        Raises:
            ImportError: xarray is not installed; `pip install "fashion_jax[xarray]"` does it.
        """
        try:
            import xarray
        except ImportError as error:
            raise ImportError('to_xarray needs xarray: pip install "fashion_jax[xarray]"') from error
        dimensions = (*self.axes, "epoch")
        epochs = range(1, np.shape(self.history.running_loss)[-1] + 1)
        return xarray.Dataset(
            {name: (dimensions, np.asarray(curve)) for name, curve in self.history.curves().items()},
            coords={**{name: list(values) for name, values in self.axes.items()}, "epoch": epochs},
        )

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={_some(values)}" for name, values in self.axes.items())
        lanes = tuple(map(len, self.axes.values()))
        epochs = np.shape(self.history.running_loss)[-1]
        return f"Sweep({axes},\n  {np.prod(lanes)} runs of {epochs} epochs, last on average: {_last(self.history)})"


class EpochEnd(NamedTuple):
    """What a callback receives after each epoch.

    Attributes:
        epoch: The epoch that has ended, from 1.
        epochs: The number of epochs asked for.
        axes: Name and values of each axis of a sweep; empty for `fit`.
        hyperparameters: The numbers that do not vary.
        history: Metrics of this epoch, leaves [*axes].
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
        """Return one flat dictionary a run: hyperparameters, seed, epoch, and the five metrics.

        >>> end = EpochEnd(1, 2, {}, {"dropout_rate": 0.2}, History(0.1, Metrics(0.2, 0.9), Metrics(0.3, 0.8)), dict)
        >>> end.rows()[0]["dropout_rate"], end.rows()[0]["validation_loss"]
        (0.2, 0.3)
        """
        rows = []
        for index in np.ndindex(*map(len, self.axes.values())):
            lane = {name: values[i] for (name, values), i in zip(self.axes.items(), index, strict=True)}
            curves = {name: float(np.asarray(curve)[index]) for name, curve in self.history.curves().items()}
            rows.append({**self.hyperparameters, **lane, "epoch": self.epoch, **curves})
        return rows


Callback = Callable[[EpochEnd], bool | None]


def _shape(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}" if hasattr(array, "shape") else type(array).__name__


def _last(history: History) -> str:
    if not np.size(history.running_loss):
        return "no epoch"
    words = {name.replace("_", " "): float(np.mean(np.asarray(c)[..., -1:])) for name, c in history.curves().items()}
    return ", ".join(f"{name} {value:.4f}" for name, value in words.items())


def _some(values: tuple[Any, ...]) -> str:
    return str(values) if len(values) <= 6 else f"({values[0]}, {values[1]}, ..., {values[-1]}; {len(values)} values)"
