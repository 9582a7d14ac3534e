"""What is fixed when a training program is compiled.

A `TrainConfig` is hashable and is passed to the jitted functions as a static argument: one config, one compilation.
What may change from run to run without a new program (the key, the dropout rate, the number of epochs) is an argument
of `fashion_jax.train.fit` instead.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class TrainConfig:
    """Network, data, loss and optimiser, as one immutable value; the default is the tutorial's experiment.

    Attributes:
        hidden: Units of each hidden layer, input side first.
        batch_size: Examples in one training step.
        learning_rate: Step size of the optimiser; the highest one if it is scheduled.
        train_eval_size: Training examples that the evaluation-mode training loss is measured on, the same ones for
            every run; None takes all of them.
        eval_batch_size: Examples in one chunk of an evaluation. It bounds memory; results depend on it by rounding
            only.
        image_shape: Shape of one image, height and width first.
        classes: Number of classes.
        input_dropout: Share of pixels to drop while training, at every dropout rate of the hidden units, 0 included.
        dtype: Type that the matrix products are computed in, "bfloat16"; the parameters' own if None, in full precision
            on every device, unless `jax_default_matmul_precision` is set. Parameters, the optimiser's state, losses
            and metrics stay float32; what layers give, bias included, and gradients are rounded to bfloat16.
        label_smoothing: Share of the target that is spread over all classes, in the training loss only.
        shift: Each training image is moved by up to this many pixels up, down, left and right; black comes in.
        flip: Each training image is mirrored, left and right, with probability 1/2.
        warmup_steps: Steps over which the learning rate rises linearly from 0.
        decay_steps: Steps, warm-up included, after which the learning rate has fallen to 0 along a half cosine; None
            keeps it constant.
        weight_decay: Each step shrinks the kernels by this times the learning rate, decoupled from the gradient: AdamW.
        max_norm: Largest Euclidean norm of the weights that lead to a unit; longer ones are scaled back after each
            step.
        average_decay: Decay of an exponential moving average of the parameters, which is then what is evaluated and
            kept as the best; see `fashion_jax.train.evaluated_params`.
        model: Another network than `FashionMLP`: called with `dropout_rate`, gives a Flax module that is called like
            it.
        loss: Another training loss than the negative log likelihood: takes log-probabilities [n, classes] and labels
            [n], and gives [n]. What is reported of evaluations stays the negative log likelihood.
        optimiser: Another optimiser than Adam: takes the learning rate, a number or an optax schedule, and gives an
            optax transformation.

    The last three are compared by identity, and must be hashable: make a `functools.partial` or a lambda once, because
    another one, however like it, is another config and compiled anew.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or two do not go together.

    >>> TrainConfig(batch_size=128).batch_size
    128
    >>> TrainConfig(batch_size=0)
    Traceback (most recent call last):
    ValueError: batch_size must be at least 1, got 0
    """

    hidden: tuple[int, ...] = (256, 128, 64)
    batch_size: int = 64
    learning_rate: float = 0.003
    train_eval_size: int | None = 10_000
    eval_batch_size: int = 2_000
    image_shape: tuple[int, ...] = (28, 28)
    classes: int = 10
    input_dropout: float = 0.0
    dtype: str | None = None
    label_smoothing: float = 0.0
    shift: int = 0
    flip: bool = False
    warmup_steps: int = 0
    decay_steps: int | None = None
    weight_decay: float = 0.0
    max_norm: float | None = None
    average_decay: float | None = None
    model: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    optimiser: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "image_shape"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                raise TypeError(f"{name} must be a tuple of ints, got {value!r}")
            for i, entry in enumerate(value):
                check_count(f"{name}[{i}]", entry, 1)
            self._hold(name, tuple(map(int, value)))
        if len(self.image_shape) < 2:
            raise ValueError(f"image_shape must be (height, width, ...), got {self.image_shape}")
        for name, least in _COUNTS.items():
            if name not in _OPTIONAL or getattr(self, name) is not None:
                self._hold(name, check_count(name, getattr(self, name), least))
        for name, (expected, fits) in _NUMBERS.items():
            if name not in _OPTIONAL or getattr(self, name) is not None:
                self._hold(name, _check_number(name, getattr(self, name), expected, fits))
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be a bool, got {self.flip!r}")
        if self.dtype not in (None, "bfloat16"):
            raise ValueError(f'dtype must be "bfloat16" or None, got {self.dtype!r}')
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps counts the warm-up too, so it must be more than warmup_steps, {self.warmup_steps}; got "
                f"{self.decay_steps}"
            )
        for name, replaced in _REPLACED.items():
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {function!r}")
            try:
                hash(function)
            except TypeError:
                raise TypeError(f"{name} must be hashable, as functions are, got {function!r}") from None
            unused = [other for other in replaced if getattr(self, other) != _DEFAULTS[other]]
            if function is not None and unused:
                raise ValueError(f"{', '.join(unused)} would have no effect: {name} replaces what uses it")

    def _hold(self, name: str, value: Any) -> None:
        """Keep Python's own number, which JSON can hold, for another kind."""
        object.__setattr__(self, name, value)

    def steps_per_epoch(self, examples: int) -> int:
        """Tell how many steps an epoch takes; the last batch may be short.

        Args:
            examples: Number of training examples.

        >>> TrainConfig().steps_per_epoch(60_000)
        938
        """
        return -(-examples // self.batch_size)

    def as_dict(self) -> dict[str, Any]:
        """Give the fields as what JSON can hold; functions by their names, a `functools.partial` with its arguments.

        Raises:
            TypeError: An argument of a `functools.partial` is nothing that JSON can hold.

        >>> TrainConfig(loss=math.dist).as_dict()["loss"]
        'math.dist'
        """
        return {field.name: _as_json(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """Take back what `as_dict` gave, by way of JSON; fields that are not there have their defaults.

        Args:
            fields: Name and value of each field.

        Raises:
            TypeError: There is no such field, or one has the wrong type, as the name of a function has.
            ValueError: A field is out of range.

        >>> TrainConfig.from_dict(TrainConfig(hidden=(32,)).as_dict()) == TrainConfig(hidden=(32,))
        True
        """
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


# Smallest allowed value of each field that counts something.
_COUNTS = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "train_eval_size": 1,
    "classes": 2,
    "shift": 0,
    "warmup_steps": 0,
    "decay_steps": 1,
}
_SHARE = ("lie in [0, 1)", lambda value: 0 <= value < 1)
_POSITIVE = ("be positive and finite", lambda value: 0 < value < math.inf)
_NUMBERS = {
    "learning_rate": _POSITIVE,
    # Programs take it as float32, in which 1 - 1e-9 is 1.
    "input_dropout": (_SHARE[0], lambda value: 0 <= value < 1 and np.float32(value) < 1),
    "label_smoothing": _SHARE,
    "weight_decay": ("be at least 0 and finite", lambda value: 0 <= value < math.inf),
    "max_norm": _POSITIVE,
    "average_decay": _SHARE,
}
_OPTIONAL = {"train_eval_size", "decay_steps", "max_norm", "average_decay"}
# What each function stands in for: these fields would be ignored without a word.
_REPLACED = {
    "model": ("hidden", "input_dropout", "dtype"),
    "loss": ("label_smoothing",),
    "optimiser": ("weight_decay",),
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def check_count(name: str, value: Any, least: int) -> int:
    """Refuse what is not a whole number, or too small a one; give it as Python's own, which JSON can hold.

    Args:
        name: What to call it in the error.
        value: What a caller gave.
        least: Smallest allowed value.

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is too small.

    >>> check_count("epochs", np.int64(3), 1)
    3
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_config(config: Any) -> None:
    """Refuse what is no TrainConfig.

    Args:
        config: What a caller gave.

    Raises:
        TypeError: It is not one.

    >>> check_config({"batch_size": 64})
    Traceback (most recent call last):
    TypeError: config must be a TrainConfig, got {'batch_size': 64}
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {config!r}")


def _check_number(name: str, value, expected: str, fits: Callable[[Any], bool]) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not fits(number):
        raise ValueError(f"{name} must {expected}, got {number}")
    return number


def _as_json(field: str, value):
    inside = functools.partial(_as_json, field)
    if isinstance(value, functools.partial):
        return {"partial": inside(value.func), "args": inside(value.args), "keywords": inside(value.keywords)}
    if callable(value):
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, np.dtype):
        return str(value)
    # Arrays and their scalars, NumPy's and JAX's.
    if hasattr(value, "tolist"):
        return inside(value.tolist())
    if isinstance(value, (tuple, list)):
        return list(map(inside, value))
    if isinstance(value, Mapping):
        return {str(name): inside(entry) for name, entry in value.items()}
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(
        f"{field} has an argument that JSON cannot hold, {value!r}; give a named function of a module in place of the "
        "functools.partial"
    )
