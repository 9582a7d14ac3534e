"""The structure of an experiment, and how hyperparameters find their place in it.

A `TrainConfig` is static: one config, one compiled program. Every number that one might want to vary is a
hyperparameter: a traced keyword argument, so that another value compiles nothing. A hyperparameter with the name of a
field of the model replaces that field; all others are arguments of the optimizer factory.
"""

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from fashion_jax import _checks
from fashion_jax.model import FashionMLP


def negative_log_likelihood(
    log_probs: Float[Array, "n classes"], labels: Int[Array | np.ndarray, " n"]
) -> Float[Array, " n"]:
    """Return each example's negative log-probability of its label, in nats.

    >>> loss = negative_log_likelihood(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]))
    >>> f"{loss[0]:.4f}"
    '1.3863'
    """
    # A sum over the row instead of an index: its gradient needs no scatter.
    chosen = jnp.asarray(labels, int)[:, None] == jnp.arange(log_probs.shape[1])[None]
    return -jnp.where(chosen, log_probs, 0).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Model, optimizer, loss and batches: what is fixed when a program is compiled. The default is the tutorial's.

    Attributes:
        model: A Flax Linen module, called as `model(images, deterministic=...)` with raw uint8 images; it returns
            log-probabilities [n, classes].
        optimizer: A factory such as `optax.adamw`, called with the hyperparameters that the model does not take. A
            schedule is part of it: `lambda learning_rate: optax.sgd(optax.cosine_decay_schedule(learning_rate, 938))`.
        loss: Maps log-probabilities [n, classes] and labels [n] to losses [n]. Evaluations always report the negative
            log likelihood.
        augment: Maps a key and images to images of the same shape and type, anew at each training step.
        eval_params: Maps the optimizer's state and the parameters to those to evaluate, such as
            `optax.contrib.schedule_free_eval_params`.
        batch_size: Examples a step.
        eval_batch_size: Examples evaluated at once; it bounds memory and changes results by rounding only.
        train_eval_size: Training examples on which the training loss is evaluated; None takes all.

    Functions are compared by identity, so create a lambda or a `functools.partial` once.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A size is too small.

    >>> TrainConfig(batch_size=0)
    Traceback (most recent call last):
    ValueError: batch_size must be at least 1, got 0
    """

    model: nn.Module = FashionMLP()  # noqa: RUF009
    optimizer: Callable[..., Any] = optax.adam
    loss: Callable[..., Any] = negative_log_likelihood
    augment: Callable[..., Any] | None = None
    eval_params: Callable[..., Any] | None = None
    batch_size: int = 64
    eval_batch_size: int = 2_000
    train_eval_size: int | None = 10_000

    def __post_init__(self) -> None:
        _checks.structure(self)


def complete(config: TrainConfig, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters with the defaults of those left out: the model's fields, and learning rate 0.003.

    >>> complete(TrainConfig(), {"b1": 0.8})
    {'dropout_rate': 0.0, 'learning_rate': 0.003, 'b1': 0.8}
    """
    fields, arguments = _fields(config.model), _arguments(config.optimizer)
    for name in hyperparameters:
        if name not in fields and name not in arguments and "**" not in arguments:
            raise TypeError(
                f"there is no hyperparameter {name!r}; the model has {', '.join(fields) or 'none'}; the optimizer has "
                f"{', '.join(arguments) or 'none'}"
            )
    tutorial = {"learning_rate": 0.003} if "learning_rate" in arguments else {}
    return fields | tutorial | dict(hyperparameters)


def compose(
    config: TrainConfig, hyperparameters: Mapping[str, Any]
) -> tuple[nn.Module, optax.GradientTransformationExtraArgs]:
    """Build the model and the optimizer with their hyperparameters, which may be traced."""
    hyperparameters = complete(config, hyperparameters)
    arguments = {name: value for name, value in hyperparameters.items() if name not in _fields(config.model)}
    optimizer = config.optimizer(**arguments)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must return an optax.GradientTransformation, got {_checks.got(optimizer)}")
    init, update = optax.with_extra_args_support(optimizer)
    # optax.adam raises a number of Python to a power of int32, which strict promotion refuses.
    update = jax.numpy_dtype_promotion("standard")(update)
    return compose_model(config, hyperparameters), optax.GradientTransformationExtraArgs(init, update)


def compose_model(config: TrainConfig, hyperparameters: Mapping[str, Any]) -> nn.Module:
    """Build the model with those hyperparameters that are fields of it."""
    fields = _fields(config.model)
    return config.model.clone(**{name: value for name, value in hyperparameters.items() if name in fields})


def _fields(model: nn.Module) -> dict[str, float]:
    """Return the model's fields that a program can take traced: numbers, but for sizes."""
    fields = {
        field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.type not in (int, "int")
    }
    return {name: value for name, value in fields.items() if _is_number(value)}


def _arguments(factory: Callable[..., Any]) -> list[str]:
    """Return the factory's arguments that may be numbers; `**` stands for any name."""
    parameters = inspect.signature(factory).parameters.values()
    named = [p.name for p in parameters if p.default in (p.empty, None) or _is_number(p.default)]
    variadic = {p.name: p.kind for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return [name for name in named if name not in variadic] + ["**"] * (
        inspect.Parameter.VAR_KEYWORD in variadic.values()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
