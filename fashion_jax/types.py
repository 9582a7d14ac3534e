"""The values passed between modules: data, metrics, states and results. This module imports none of the others.

A leaf is an array whose axes grow in front: [epochs] for a run, [*hyperparameters, seeds, epochs] for a sweep.
"""

import dataclasses
import importlib
import reprlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

if TYPE_CHECKING:
    import pandas
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
    """The official split, for Fashion-MNIST 60,000 training and 10,000 test images."""

    train: Batch
    test: Batch


class Metrics(NamedTuple):
    """Mean negative log likelihood in nats, and the fraction of examples classified correctly."""

    loss: Float[Array | np.ndarray, "*axes"]
    accuracy: Float[Array | np.ndarray, "*axes"]


class Measured(NamedTuple):
    """`Metrics` and, by name, the values of `TrainConfig.metrics`; returned in place of `Metrics` if there are any."""

    loss: Float[Array | np.ndarray, "*axes"]
    accuracy: Float[Array | np.ndarray, "*axes"]
    others: Mapping[str, Float[Array | np.ndarray, "*axes"]]


class History(NamedTuple):
    """Metrics after each epoch; every leaf ends with the axis [epochs].

    Attributes:
        running_loss: Mean of the batch losses while training, dropout on: the tutorial's training curve.
        train: Metrics on a fixed part of the training set after the epoch, dropout off. NaN after an epoch that
            `TrainConfig.evaluate_every` leaves out.
        validation: The same on the validation set.
        steps: Means over the epoch's steps of those `TrainConfig.metrics` that measure a step.
    """

    running_loss: Float[Array | np.ndarray, "*axes"]
    train: Metrics | Measured
    validation: Metrics | Measured
    steps: Mapping[str, Float[Array | np.ndarray, "*axes"]] = {}

    def curves(self) -> dict[str, Any]:
        """Return all curves by name, as in tables, logs and data frames.

        >>> list(History(0.1, Metrics(0.2, 0.9), Metrics(0.3, 0.8)).curves())
        ['running_loss', 'train_loss', 'train_accuracy', 'validation_loss', 'validation_accuracy']
        """
        return {
            "running_loss": self.running_loss,
            "train_loss": self.train.loss,
            "train_accuracy": self.train.accuracy,
            "validation_loss": self.validation.loss,
            "validation_accuracy": self.validation.accuracy,
            **{f"train_{name}": curve for name, curve in getattr(self.train, "others", {}).items()},
            **{f"validation_{name}": curve for name, curve in getattr(self.validation, "others", {}).items()},
            **self.steps,
        }

    def __repr__(self) -> str:
        return f"History({list(np.shape(self.running_loss))}, last: {_last(self)})"


class TrainState(NamedTuple):
    """Everything that a training step updates. It holds no key: seed and `step` determine all further draws.

    Attributes:
        params: The model's parameters, such as {"fc1": {"kernel": [in, out], "bias": [out]}, ...}.
        opt_state: The optimizer's state.
        step: Number of steps taken.
        collections: The model's other variables, such as {"batch_stats": ...}; most models have none.
    """

    params: Params
    opt_state: Any
    step: Int[Array | np.ndarray, "*lanes"]
    collections: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        size = sum(map(np.size, jax.tree.leaves(self.params)))
        return f"TrainState({size:,} parameters, step {_mean(lambda: self.step, '.0f')})"


class Best(NamedTuple):
    """The parameters after the epoch with the lowest validation loss: the result of early stopping.

    Attributes:
        params: The model's parameters.
        loss: Validation loss, in nats; infinite before the first epoch.
        epoch: The epoch, from 1; 0 before the first.
        collections: The model's other variables at that time.
    """

    params: Params
    loss: Float[Array | np.ndarray, "*lanes"]
    epoch: Int[Array | np.ndarray, "*lanes"]
    collections: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        where = list(np.shape(self.loss)) or f"epoch {self.epoch}"
        return f"Best({where}, validation loss {_mean(lambda: self.loss)})"


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
        return f"Run({self.state!r},\n  {self.history!r},\n  best: {self.best!r})"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
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

    def at(self, **values: float | int) -> Any:
        """Return the part of the sweep with the given values, such as `at(dropout_rate=0.2)`.

        Args:
            **values: A value of each axis to select from; these axes disappear.

        Returns:
            A `Sweep` with the remaining axes, or a `Run` if there are none.

        Raises:
            KeyError: There is no such axis, or it has no such value.

        >>> leaf, step = np.arange(6.0).reshape(2, 3, 1), np.zeros((2, 3), int)
        >>> history = History(leaf, Metrics(leaf, leaf), Metrics(leaf, leaf))
        >>> axes = {"dropout_rate": (0.0, 0.2), "seed": (0, 1, 2)}
        >>> result = Sweep(axes, TrainState({}, (), step), history, Best({}, leaf[..., 0], step))
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
        """Return the history as an `xarray.Dataset` of axes and epoch; needs the extra `xarray`."""
        coordinates = self._coordinates()
        curves = {name: (tuple(coordinates), np.asarray(curve)) for name, curve in self.history.curves().items()}
        return _extra("xarray").Dataset(curves, coords=coordinates)

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return the history as a `pandas.DataFrame`, one row for each run and epoch; needs the extra `pandas`."""
        coordinates = self._coordinates()
        rows = _extra("pandas").MultiIndex.from_product(coordinates.values(), names=coordinates).to_frame(index=False)
        return rows.assign(**{name: np.ravel(curve) for name, curve in self.history.curves().items()})

    def _coordinates(self) -> dict[str, Any]:
        epochs = range(1, np.shape(self.history.running_loss)[-1] + 1)
        return {**{name: list(values) for name, values in self.axes.items()}, "epoch": epochs}

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={reprlib.repr(values)}" for name, values in self.axes.items())
        return f"Sweep({axes},\n  {self.history!r})"


Trained = Params | TrainState | Best


def variables(trained: Trained) -> dict[str, Any]:
    """Return the Flax variables of a state, of the best of a run, or of parameters alone.

    >>> variables(Best({"fc1": 1}, 0.5, 3, {"batch_stats": 2}))
    {'params': {'fc1': 1}, 'batch_stats': 2}
    """
    if isinstance(trained, (TrainState, Best)):
        return {"params": trained.params, **trained.collections}
    return {"params": trained}


def _extra(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'this needs {package}: pip install "fashion_jax[{package}]"') from error


def _shape(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else type(array).__name__


def _last(history: History) -> str:
    last = {name: _mean(lambda c=curve: np.atleast_1d(c)[..., -1]) for name, curve in history.curves().items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in last.items())


def _mean(leaf: Callable[[], Any], form: str = ".4f") -> str:
    try:
        return format(np.mean(np.asarray(leaf())), form)
    except Exception:  # No epoch; a tree of tracers, or of anything else that `jax.tree.map` makes.
        return "?"
