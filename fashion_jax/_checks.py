"""Argument checks, called once at the public entry points; internal code trusts its input.

Each takes the argument's name and value, returns the value in the form that the package works with, and otherwise
raises an error that names the argument, the value and the fix.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import numbers
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fashion_jax.types import Batch, History, Metrics

# What others call something, where the two names have little in common.
ELSEWHERE = {"lr": "learning_rate", "wd": "weight_decay", "p": "dropout_rate", "beta1": "b1", "beta2": "b2"}
# Whose arguments are looked for in the wrong place; of two owners the later one is named.
OWNERS = {
    "optax.adamw": ("weight_decay",),
    "optax.sgd": ("momentum", "nesterov"),
    "fit": ("key", "start"),
    "sweep": ("seeds", "devices", "lanes_at_once"),
    "fit and sweep": ("learning_rate", "weight_decay", "dropout_rate", "epochs", "callbacks", "checkpoint", "progress"),
    "TrainConfig": ("model", "optimizer", "loss", "augment", "eval_params", "batch_size", "evaluate_every", "metrics"),
    "FashionMLP": ("hidden", "classes"),
}
Class = TypeVar("Class", bound=type)


def integer(name: str, value: Any, least: int) -> int:
    """Return a whole number of at least `least`, as Python's own.

    >>> integer("epochs", np.int64(3), 1)
    3
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {got(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def got(value: Any) -> str:
    """Return a value as text for a message, in one line of at most 80 characters."""
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


def did_you_mean(name: str, own: Iterable[str], owners: Mapping[str, Iterable[str]] = OWNERS) -> str:
    """Return a question for the end of a message, if a name resembles one of its owner's own, or of other owners.

    >>> did_you_mean("optimiser", ["model", "optimizer"]), did_you_mean("lr", ["model", "optimizer"])
    ('; did you mean optimizer?', '; did you mean learning_rate of fit and sweep?')
    """
    whose = {known: f" of {owner}" for owner, names in owners.items() for known in names} | dict.fromkeys(own, "")
    meant = difflib.get_close_matches(ELSEWHERE.get(name, name), whose, n=1, cutoff=0.7)
    return f"; did you mean {meant[0]}{whose[meant[0]]}?" if meant else ""


def fields(cls: Any) -> list[str]:
    """Return the names of a dataclass's fields, without those that Flax adds to a module's."""
    return [field.name for field in dataclasses.fields(cls) if field.name not in ("parent", "name")]


def known_fields(cls: Class) -> Class:
    """Let the constructor of a dataclass tell which field was meant, which Python's own error does not."""
    init, own = cls.__init__, fields(cls)

    @functools.wraps(init)
    def checked(self, *values, **named):
        for name in named:
            if name not in (*own, "parent", "name"):
                hint = did_you_mean(name, own)
                raise TypeError(f"{cls.__name__} has no field {name!r}; it has {', '.join(own)}{hint}")
        init(self, *values, **named)

    cls.__init__ = checked
    return cls


def number(name: str, value: Any) -> float:
    """Return a finite number, as Python's own."""
    untraced(name, value)
    scalar = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    if not scalar or isinstance(value, bool) or getattr(value, "dtype", np.dtype(float)).kind not in "fiuV":
        how = "as in TrainConfig(optimizer=lambda: optax.adam(schedule))"
        hint = f"; a schedule belongs in the optimizer factory, {how}" if callable(value) else ""
        raise TypeError(f"{name} must be a number, got {got(value)}{hint}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    # In decimals, so that np.float32(0.2) is 0.2.
    return float(str(value) if hasattr(value, "dtype") else value)


def rate(name: str, value: Any) -> Any:
    """Return a dropout rate in [0, 1), as Python's own number; a traced one passes, its value is not known yet."""
    if isinstance(value, Tracer):
        return value
    value = number(name, value)
    # Programs compute in float32, in which 1 - 1e-9 is 1.
    if not 0 <= value < 1 or np.float32(value) == 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return value


def seed(name: str, value: Any) -> int:
    """Return a seed of 32 bits: of more, `jax.random.key` drops the upper ones."""
    value = integer(name, value, 0)
    if value >= 2**32:
        raise ValueError(f"{name} must be at most {2**32 - 1}, got {value}")
    return value


def axis(name: str, value: Any, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    """Return the checked values of a sweep's axis, at least one and no two alike."""
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence such as range(8), got {got(value)}")
    values = [check(name, entry) for entry in value]
    if not values or len(set(as_computed(values))) < len(values):
        raise ValueError(f"{name} must hold at least one value, and none twice, got {values}")
    return tuple(values)


def as_computed(values: Any) -> Any:
    """Return numbers as programs compute with them, as text: in float32, 0.3 and 0.1 + 0.2 are the same.

    >>> as_computed([0.1 + 0.2, np.float32(0.3)])
    ['0.3', '0.3']
    """
    found = np.asarray(values)
    return (found.astype(jnp.result_type(float)) if found.dtype.kind == "f" else found).astype(str).tolist()


def key(value: Any) -> jax.Array:
    """Return one typed key."""
    untraced("key", value)
    if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.shape == ()):
        raise TypeError(f"key must be one typed key, from jax.random.key(seed); got {got(value)}")
    return value


def batch(name: str, value: Any, *, classes: int | None = None) -> Batch:
    """Return a data set as NumPy arrays: images uint8, labels int32.

    Args:
        name: Name of the argument.
        value: Images [n, height, width, ...] and labels [n].
        classes: Number of classes; labels must lie below it.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{name} must be a Batch(images, labels), got {type(value).__name__}")
    images = pixels(f"{name}.images", value[0])
    labels = array(f"{name}.labels", value[1])
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name}.labels must be integers, got {labels.dtype}")
    if images.ndim < 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} must hold images [n, height, width] and labels [n], got {list(images.shape)} and "
            f"{list(labels.shape)}"
        )
    if not len(labels):
        raise ValueError(f"{name} must hold at least one example, got none")
    low, high = int(labels.min()), int(labels.max())
    limit = 2**31 if classes is None else classes
    if low < 0 or high >= limit:
        raise ValueError(f"{name}.labels must lie in 0..{limit - 1}, got {low}..{high}")
    return Batch(images, labels.astype(np.int32))


def pixels(name: str, value: Any) -> np.ndarray:
    """Return images as a NumPy array of uint8."""
    images = array(name, value)
    if images.dtype == np.uint8:
        return images
    found = str(images.dtype)
    if images.size and images.dtype.kind in "iuf":
        found += f" from {images.min():g} to {images.max():g}"
    raise TypeError(
        f"{name} must be uint8 pixels from 0 to 255, got {found}; pass the raw pixels, with .astype(np.uint8) if they "
        "are: the model normalizes them"
    )


def array(name: str, value: Any) -> np.ndarray:
    """Return an array of NumPy or JAX as a plain NumPy array."""
    untraced(name, value)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; drop or fill the masked entries first, as its .filled() does")
    if not isinstance(value, (np.ndarray, jax.Array)):
        hint = ".numpy() converts it" if type(value).__module__ == "torch" else "np.asarray converts it"
        raise TypeError(f"{name} must be a NumPy or JAX array, got {type(value).__name__}; {hint}")
    return np.asarray(value)


def untraced(name: str, value: Any) -> None:
    """Raise TypeError for a value that jax.jit or jax.vmap traces."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced by jax.jit or jax.vmap; call this outside, and use sweep for many runs")


def history(name: str, value: Any, *axes: str, must_be_finite: bool = True) -> History:
    """Return a history with leaves of float64 and at least one epoch.

    Args:
        name: Name of the argument.
        value: Metrics after each epoch.
        *axes: Names of its axes, such as "seeds", "epochs"; any number in front of the epochs if left out.
        must_be_finite: Leave out the epochs that were not evaluated, and refuse a run that diverged.
    """
    if not isinstance(value, History):
        hint = "; pass its .history" if hasattr(value, "history") else ""
        raise TypeError(f"{name} must be a History, got {type(value).__name__}{hint}")
    leaves = (value.running_loss, *value.train[:2], *value.validation[:2])
    curves = [np.asarray(leaf, np.float64) for leaf in leaves]
    running, shapes = curves[0], {leaf.shape for leaf in curves}
    if len(shapes) > 1 or not running.size or not running.ndim or (axes and running.ndim != len(axes)):
        expected = ", ".join(axes or ("...", "epochs"))
        raise ValueError(f"{name} must have leaves [{expected}] of one shape, got {sorted(map(list, shapes))}")
    if must_be_finite:
        curves = [leaf[..., evaluated(value) - 1] for leaf in curves]
        finite(name, np.concatenate(curves, axis=-1))
    running, train_loss, train_accuracy, loss, accuracy = curves
    return History(running, Metrics(train_loss, train_accuracy), Metrics(loss, accuracy))


def evaluated(history: History) -> np.ndarray:
    """Return the numbers of the epochs that end with an evaluation, from 1; a run that diverged counts as evaluated."""
    seen = ~np.isnan(history.validation.loss) | np.isnan(history.running_loss)
    return 1 + np.flatnonzero(seen.reshape(-1, seen.shape[-1]).any(axis=0))


def finite(name: str, runs: np.ndarray) -> None:
    """Raise ValueError if a number in [*runs, n] is not finite."""
    bad = np.argwhere(~np.isfinite(runs).all(axis=-1))
    if len(bad):
        where = f", in runs {bad.tolist()}; leave these out, in every arm" if bad.size else ""
        raise ValueError(f"{name} holds numbers that are not finite{where}")


def epoch(history: History, axes: Mapping[str, Sequence[Any]]) -> None:
    """Warn of runs that have diverged or stopped learning; raise FloatingPointError if all have diverged.

    Args:
        history: Leaves [lanes, epochs].
        axes: Those of the lanes.
    """
    diverged, number = np.isnan(history.running_loss[:, -1]), history.running_loss.shape[1]
    seen = evaluated(history)[-3:]
    losses = np.stack([history.train.loss, history.validation.loss])[..., seen - 1]
    # Parameters that no step has changed have the same losses, to the last bit.
    same = (np.diff(losses) == 0).all(axis=0)
    if number in seen and (same[:, -1:] & ~same[:, :-1].any(axis=1, keepdims=True)).any():
        warnings.warn(f"the losses have not changed since epoch {seen[-2]}: has a schedule ended?", stacklevel=5)
    new = diverged & ~np.isnan(history.running_loss[:, :-1]).any(axis=1)
    if not new.any():
        return
    if diverged.all():
        raise FloatingPointError(f"training diverged in epoch {number}; a lower learning_rate may help")
    lanes = list(itertools.product(*axes.values()))
    first = ", ".join(f"{name}={value}" for name, value in zip(axes, lanes[new.argmax()], strict=True))
    told = f"{new.sum()} of {len(new)} runs diverged in epoch {number} ({first}{', ...' if new.sum() > 1 else ''})"
    warnings.warn(f"{told}; their history is NaN from there on", stacklevel=5)


def functions(name: str, value: Any) -> list[Any]:
    """Return a list of functions."""
    found = list(value) if isinstance(value, Iterable) else [None]
    if any(isinstance(function, type) or not callable(function) for function in found):
        raise TypeError(f"{name} must be a list of functions, got {got(value)}")
    return found


def path(name: str, value: Any) -> Path:
    """Return a local path with ~ expanded."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {got(value)}")
    if "://" in str(value):
        raise ValueError(f"{name} must be a local path, got {str(value)!r}")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} is {str(value)!r}, and there is no home directory: {error}") from None
